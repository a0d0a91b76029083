"""How tokens meet stacked expert weights: sort by expert, matmul by expert, un-sort and combine.

Pure arithmetic, imports nothing of ours. In reading order: `layer` (what the network calls; only it
chooses a path), `plan` (the sorting of one dispatch), `segments` (the path of CPUs: a loop over the
experts, fused by hand), `grouped` (the path of GPUs: grouped matmuls and gathers), `choice` (the
same where a token may have any number of experts), `dense` (one SwiGLU by hand, of which the
segments are made), `exact` (the router's matmul) and `ranks` (sums over all ranks).

Shapes: M tokens, K experts per token, R = M*K routed rows, E experts, D hidden, F expert hidden.
On a GPU every shape is static, and in bfloat16 on compute capability 9.x and 10.x (H100 to B300)
no tensor's value is read on the host. On other GPUs and in other dtypes torch's `grouped_mm` is a
loop over the experts that reads the offsets on the host, once a matmul. No sum depends on the order
of atomics: equal input gives equal bits.
"""

from moe_ops.exact import exact_linear
from moe_ops.grouped import grouped_linear, swiglu_grouped
from moe_ops.layer import gelu_experts, swiglu, swiglu_experts
from moe_ops.plan import DispatchPlan, sort_by_expert, sum_rows
from moe_ops.ranks import gather_over_ranks, num_ranks, rank, sum_over_ranks
from moe_ops.segments import swiglu_segments

__all__ = [
    "DispatchPlan",
    "exact_linear",
    "gather_over_ranks",
    "gelu_experts",
    "grouped_linear",
    "num_ranks",
    "rank",
    "sort_by_expert",
    "sum_over_ranks",
    "sum_rows",
    "swiglu",
    "swiglu_experts",
    "swiglu_grouped",
    "swiglu_segments",
]
