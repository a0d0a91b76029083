"""How every script declares its flags: kebab-case in groups, snake_case as an alias, ranges."""

import argparse
import math
from typing import Any


def parse_bool(text: str) -> bool:
    """Read the value of a switch, so that `--rf`, `--rf True` and `--rf False` all work."""
    choices = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in choices:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return choices[text.lower()]


flag: dict[str, Any] = {"type": parse_bool, "nargs": "?", "const": True, "metavar": "BOOL"}


def number(kind: type, low: float, high: float = math.inf) -> Any:
    """Return an argparse type that accepts `kind` in [low, high] only."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return value

    parse.__name__ = kind.__name__
    return parse


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the module docstring's lines and show defaults, except None: the text explains those."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.required:
            return action.help
        return super()._get_help_string(action)


class FlagGroup:
    """One titled group of flags."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def add(self, name: str, *aliases: str, **options: Any) -> None:
        """Add a flag by its kebab-case name; its snake_case spelling (as published) works too."""
        dest = name[2:].replace("-", "_")
        spellings = dict.fromkeys((name, f"--{dest}", *aliases))
        self._group.add_argument(*spellings, dest=dest, **options)


class FlagParser(argparse.ArgumentParser):
    """ArgumentParser whose help is the script's docstring, then its flags by group."""

    def __init__(self, docstring: str | None, **options: Any) -> None:
        options |= {"formatter_class": _HelpFormatter, "allow_abbrev": False}
        super().__init__(description=docstring, **options)

    def group(self, title: str) -> FlagGroup:
        """Start a group of flags."""
        return FlagGroup(self.add_argument_group(title))


def sampling_flags(parser: FlagParser, batch_size: int = 64) -> FlagGroup:
    """Add the group of flags that `Diffusion.sample` takes, for every script that samples."""
    group = parser.group("Sampling")
    group.add("--sampler", help="euler, heun (rf); ddpm, ddim, dpm++ (ddpm)")
    group.add("--num-sampling-steps", type=number(int, 1), help="default: the sampler's own")
    group.add("--cfg-scale", type=number(float, 0), default=1.5, help="guidance; 1 = off")
    group.add("--cfg-channels", type=number(int, 1), help="guided; default: ddpm 3, rf all")
    group.add(
        "--cfg-interval", nargs=2, type=number(float, 0, 1), default=[0.0, 1.0], help="guided t"
    )
    group.add("--seed", type=number(int, 0), default=0, help="of the noise")
    group.add("--batch-size", type=number(int, 1), default=batch_size, help="images at once")
    return group


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `Diffusion.sample` that `sampling_flags` describe."""
    return {
        "sampler": args.sampler,
        "num_steps": args.num_sampling_steps,
        "cfg_scale": args.cfg_scale,
        "cfg_channels": args.cfg_channels,
        "cfg_interval": tuple(args.cfg_interval),
    }
