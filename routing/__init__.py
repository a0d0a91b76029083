"""What experts were chosen: counts by hooks, tables, measures, figures.

`counting` counts while a model runs and measures counts; `tables` keeps them in a file; `figures`
and `report.html` are how they look. `tracing` keeps every choice for a few pictures, `overlay`
paints it over them, `charts` draws it small. Knows `common` and `models` only.
"""

from routing.counting import (
    PROB_UNIT,
    LoadCounter,
    RoutingRecorder,
    dead_experts,
    load_entropy,
    max_violation,
    mutual_information,
    normalized_mutual_information,
    pair_counts,
    pair_usage,
    tokens_per_expert,
)

__all__ = [
    "PROB_UNIT",
    "LoadCounter",
    "RoutingRecorder",
    "dead_experts",
    "load_entropy",
    "max_violation",
    "mutual_information",
    "normalized_mutual_information",
    "pair_counts",
    "pair_usage",
    "tokens_per_expert",
]
