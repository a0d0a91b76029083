"""Train a DiT-MoE with DeepSpeed ZeRO: optimizer, gradients, EMA and weights cut over the ranks.

    torchrun --nproc_per_node=8 train_deepspeed.py --deepspeed-config config/zero3.json \\
        --model DiT-G/2 --data-path IMAGES --rf --grad-checkpointing
    torchrun --nproc_per_node=8 train_deepspeed.py --expert-parallel 8 --model DiT-G/2 \\
        --data-path IMAGES --rf --grad-checkpointing
    python train_deepspeed.py --model DiT-G/2 --data-path IMAGES --dry-run

The same flags, data, loss, curves and pictures as train.py; only the engine differs. Running the
same command again continues where the run stopped, bit for bit on the same number of ranks.
`python convert.py RUN model.safetensors` makes one file of a run.
"""

import argparse

from common.errors import one_line_errors
from common.flags import FlagParser, number
from training.flags import build_parser


def build_deepspeed_parser() -> FlagParser:
    """Return train.py's flags and those of the engine."""
    parser = build_parser(__doc__)
    group = parser.group("DeepSpeed")
    group.add(
        "--deepspeed-config",
        default="config/zero2.json",
        metavar="FILE",
        help="JSON file with the ZeRO stage and the precision of the engine.",
    )
    group.add(
        "--local-rank",
        type=int,
        metavar="N",
        help="Number of this process on its node, which launchers give; not read.",
    )
    group.add(
        "--plan-ranks",
        type=number(int, 1),
        nargs="+",
        metavar="N",
        help="Numbers of ranks whose memory --dry-run plans. Default: this run's, else 8 16 64.",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Train, or plan."""
    # Here, since torch takes seconds to import: --help and a mistyped flag need none of it.
    from training import zero
    from training.loop import launch
    from training.zero_config import check_experts, read_config, resolve_precision
    from training.zero_trainer import DeepSpeedTrainer, plan_stages

    config = read_config(args.deepspeed_config)
    check_experts(args.expert_parallel or 1, config, f"--deepspeed-config {args.deepspeed_config}")
    wanted, precision = resolve_precision(args, config)
    rt = zero.join()
    if rt.is_main and precision != wanted:
        print(f"{wanted} is not native on this hardware: training in {precision}")
    launch(
        args,
        DeepSpeedTrainer,
        meta=True,
        precision=precision,
        plan=lambda job: plan_stages(job, args.plan_ranks),
    )


if __name__ == "__main__":
    with one_line_errors():
        main(build_deepspeed_parser().parse_args())
