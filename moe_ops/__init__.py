"""How tokens meet stacked expert weights: sort by expert, matmul by expert, un-sort and combine.

Pure arithmetic, imports nothing of ours. In reading order: `layer` (what the network calls), `plan`
(the sorting of one dispatch), `matmul` (the experts' matmuls, and how they run where), `fused` (the
experts themselves, and one that sees all tokens), `gelu` (those with biases and a GELU), `choice`
(where a token may have any number of experts), `rounding` (weights in half precision), `exact` (the
router's matmul), `ranks` (sums over all ranks) and `exchange` (where the experts of a layer live on
different ranks).

Shapes: M tokens, K experts per token, R = M*K routed rows, E experts, D hidden, F expert hidden.
One code for all devices. On a GPU every shape is static, and in bfloat16 on compute capability 9.x
and 10.x (H100 to B300) no tensor's value is read on the host; on other GPUs and in other dtypes a
layer reads its segments' ends once. No sum depends on the order of atomics: equal input gives equal
bits.
"""

from moe_ops.exact import exact_linear
from moe_ops.exchange import ExpertGroup, check_expert_parallel, exchange
from moe_ops.fused import activate, activate_backward, swiglu_rows
from moe_ops.layer import gelu_experts, plan_dispatch, swiglu, swiglu_experts
from moe_ops.matmul import expert_matmuls, grouped_linear
from moe_ops.plan import DispatchPlan, sort_by_expert, sum_rows
from moe_ops.ranks import gather_over_ranks, num_ranks, rank, sum_over_ranks
from moe_ops.rounding import rounded_once

__all__ = [
    "DispatchPlan",
    "ExpertGroup",
    "activate",
    "activate_backward",
    "check_expert_parallel",
    "exact_linear",
    "exchange",
    "expert_matmuls",
    "gather_over_ranks",
    "gelu_experts",
    "grouped_linear",
    "num_ranks",
    "plan_dispatch",
    "rank",
    "rounded_once",
    "sort_by_expert",
    "sum_over_ranks",
    "sum_rows",
    "swiglu",
    "swiglu_experts",
    "swiglu_rows",
]
