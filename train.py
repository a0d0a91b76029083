"""Train a DiT-MoE with DistributedDataParallel, on one CPU or many GPU nodes.

    python train.py --data-path digits --model DiT-Ti/1 --rf --max-steps 1000
    torchrun --nproc_per_node=8 train.py --model DiT-S/2 --num-experts 8 --data-path IMAGES
    torchrun --nproc_per_node=8 train.py --model DiT-XL/2 --expert-parallel 8 --data-path IMAGES

Running the same command again continues where the run stopped, bit for bit.
"""

import argparse

from common.errors import one_line_errors
from training.flags import build_parser


def main(args: argparse.Namespace) -> None:
    """Train."""
    # Here, since torch takes seconds to import: --help and a mistyped flag need none of it.
    from training.ddp import DdpTrainer, ExpertParallelTrainer, plan_experts
    from training.loop import launch

    if args.expert_parallel is None:
        launch(args, DdpTrainer)
    else:
        launch(args, ExpertParallelTrainer, meta=True, plan=plan_experts)


if __name__ == "__main__":
    with one_line_errors():
        main(build_parser(__doc__).parse_args())
