"""How far int8 experts are from the weights they stand for: relative error of a model's output.

python scripts/experiments/int8.py --ckpt results/fashion
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from checkpoint.weights import find_objective, load_settings
from diffusion import create_diffusion
from sampling.offload import load_for_sampling

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    """Compare int8 with half and full precision, and these two with each other."""
    variants = {
        f"{kind} {str(dtype).removeprefix('torch.')}": load_for_sampling(
            args.ckpt, dtype=dtype, quantize="int8" if kind == "int8" else None
        )
        for kind in ("plain", "int8")
        for dtype in (torch.float32, torch.bfloat16)
    }
    config = variants["plain float32"].config
    objective = find_objective(load_settings(args.ckpt), config, None)
    diffusion = create_diffusion(objective, learn_sigma=config.learn_sigma)
    generator = torch.Generator().manual_seed(0)
    shape = (args.num_images, config.in_channels, config.input_size, config.input_size)
    y = torch.arange(args.num_images) % config.num_classes
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in variants}
    for time in TIMES:
        x, t = torch.randn(shape, generator=generator), torch.full(y.shape, time)
        for name, model in variants.items():
            outputs[name].append(model(x, t * diffusion.time_scale, y).float())
    for name, reference in (
        ("plain bfloat16", "plain float32"),
        ("int8 float32", "plain float32"),
        ("int8 bfloat16", "plain bfloat16"),
    ):
        found, expected = torch.stack(outputs[name]), torch.stack(outputs[reference])
        error = ((found - expected).norm() / expected.norm()).item()
        print(f"{name} against {reference}: relative error {error:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", required=True, help="checkpoint, run folder or published weights")
    parser.add_argument("--num-images", type=int, default=8, help="of noise, at each of 5 times")
    main(parser.parse_args())
