"""How every script declares its flags: kebab-case in groups, other spellings, ranges, help.

`--help` lists a flag once, as a sentence with its default; published spellings (snake_case and
others) work all the same. A mistake ends the script with one line and exit code 2.
"""

import argparse
import difflib
import math
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from common.errors import printable
from common.names import DTYPES

MAX_INT = 10**9  # of any count: beyond lie typing errors


# ------------------------------------------------------------------------------ values


def parse_bool(text: str) -> bool:
    """Read the value of a switch, so that `--rf`, `--rf True` and `--rf False` all work."""
    choices = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in choices:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return choices[text.lower()]


flag: dict[str, Any] = {"type": parse_bool, "nargs": "?", "const": True, "metavar": "BOOL"}


def parse_average(text: str) -> bool | float:
    """Read a value of `--ema`: a switch, or the decay of one of several averages."""
    try:
        return parse_bool(text)
    except argparse.ArgumentTypeError:
        pass
    try:
        decay = float(text)
    except ValueError:
        decay = 0.0
    if not 0 < decay < 1:
        raise argparse.ArgumentTypeError(f"expected True, False or a decay below 1, got {text!r}")
    return decay


average_flag: dict[str, Any] = {
    **flag,
    "type": parse_average,
    "metavar": "BOOL|DECAY",
    "default": True,
}


def number(kind: type, low: float, high: float | None = None) -> Any:
    """Return an argparse type that accepts `kind` in [low, high] only; never nan or inf.

    Args:
        kind: int or float.
        low: smallest value.
        high: largest value; default: `MAX_INT` for int, any finite number for float.
    """
    largest = MAX_INT if high is None and kind is int else high
    allowed = f"[{low}, inf)" if largest is None else f"[{low}, {largest}]"

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= (math.inf if largest is None else largest) or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} is not in {allowed}")
        return value

    parse.__name__ = kind.__name__
    return parse


# torch takes seeds below 2^64; scripts add ranks, steps and repetitions to theirs.
seed = number(int, 0, 2**63 - 1)


def _parse_dtype(text: str) -> str:
    """Return the name in `DTYPES`; the long names, such as bfloat16, are accepted too."""
    names = {long: name for name, long in DTYPES.items()} | {name: name for name in DTYPES}
    if text not in names:
        raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(DTYPES)}")
    return names[text]


dtype_flag: dict[str, Any] = {"type": _parse_dtype, "metavar": "{" + ",".join(DTYPES) + "}"}


def model_size(names: Iterable[str]) -> dict[str, Any]:
    """Return the options of `--model`, which names one of `models.DiT_models`."""
    known = list(names)

    def parse(text: str) -> str:
        if text not in known:
            near = difflib.get_close_matches(text, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentTypeError(f"{text} is none of {in_groups(known)}{hint}")
        return text

    return {"type": parse, "metavar": "SIZE"}


def in_groups(names: Iterable[str]) -> str:
    """Shorten names of the form FAMILY-SIZE/PATCH: DiT-{Ti,S}/{2,4}, DiT-Ti/1."""
    patches: dict[str, dict[str, list[str]]] = {}  # family -> size -> patches
    for name in names:
        family, _, rest = name.rpartition("-")
        size, _, patch = rest.partition("/")
        patches.setdefault(family, {}).setdefault(size, []).append(patch)
    groups = []
    for family, left in patches.items():
        while left := {size: found for size, found in left.items() if found}:
            # The patches of one size, with all sizes that have them: the most names at once.
            shared = {tuple(p): [s for s in left if set(p) <= set(left[s])] for p in left.values()}
            most = max(shared, key=lambda found: len(found) * len(shared[found]))
            groups.append(f"{family}-{_braced(shared[most])}/{_braced(most)}")
            for size in shared[most]:
                left[size] = [patch for patch in left[size] if patch not in most]
    return ", ".join(groups)


def _braced(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{{{','.join(parts)}}}"


# ------------------------------------------------------------------------------ parser


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keep the module docstring's lines; say the default after each flag's sentence."""

    def add_usage(
        self, usage: Any, actions: Iterable[argparse.Action], groups: Any, prefix: Any = None
    ) -> None:
        """Show what must be given; the flags are listed below, once."""
        actions = list(actions)
        if usage is None and prefix is None:
            shown = [action for action in actions if not action.option_strings or action.required]
            rest = [argparse.Action([], "flags", metavar="[flags]")]
            actions, groups = [*rest, *shown] if len(shown) < len(actions) else shown, []
        super().add_usage(usage, actions, groups, prefix)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        """Return the help with a default that is a value; the text explains any other."""
        text = action.help
        if not text or not action.option_strings or action.nargs == 0:
            return text
        text = text if text.endswith((".", "?", ")")) else f"{text}."
        if action.default is None or action.required or action.default == argparse.SUPPRESS:
            return text
        return f"{text} Default: {shown_default(action.default).replace('%', '%%')}."


def shown_default(value: Any) -> str:
    """Return a default as a user would type it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value)


class FlagGroup:
    """One titled group of flags."""

    def __init__(self, group: Any, aliases: dict[str, str]) -> None:
        self._group, self._aliases = group, aliases

    def add(self, name: str, *aliases: str, **options: Any) -> None:
        """Add a flag by its kebab-case name; its snake_case spelling (as published) works too."""
        dest = name[2:].replace("-", "_")
        self._aliases |= dict.fromkeys((name, f"--{dest}", *aliases), name)
        self._group.add_argument(name, dest=dest, **options)


class FlagParser(argparse.ArgumentParser):
    """ArgumentParser whose help is the script's docstring, then its flags by group."""

    def __init__(self, docstring: str | None, **options: Any) -> None:
        options |= {"formatter_class": _HelpFormatter, "allow_abbrev": False}
        super().__init__(description=docstring, **options)
        self.spellings: dict[str, str] = {}  # every spelling -> name

    def group(self, title: str) -> FlagGroup:
        """Start a group of flags."""
        return FlagGroup(self.add_argument_group(title), self.spellings)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse after putting each flag's name for its other spellings; no unknown word is left.

        Here, since a parser of subcommands calls it on that of the chosen one.
        """
        words = [self._named(word) for word in (sys.argv[1:] if args is None else args)]
        known, unknown = super().parse_known_args(words, namespace)
        if unknown:
            self.error(self._explain(unknown[0]))
        return known, []

    def _named(self, word: str) -> str:
        spelling, equals, value = word.partition("=")
        return self.spellings.get(spelling, spelling) + equals + value

    def _explain(self, word: str) -> str:
        """Say what is wrong with a word that is no flag and no value of one."""
        if not word.startswith("-"):
            return f"unexpected {word!r}, no flag takes it"
        given = word.partition("=")[0]
        near = difflib.get_close_matches(given, self.spellings, 1)
        hint = f"did you mean {self.spellings[near[0]]}?" if near else "--help lists all flags"
        return f"unknown flag {given}; {hint}"

    def error(self, message: str) -> NoReturn:
        """End the script with one line, as `common.errors.one_line_errors` does."""
        rank = os.environ.get("RANK", "0")
        where = self.prog if rank == "0" else f"{self.prog} (rank {rank})"
        message = message.removeprefix("argument ")
        self.exit(2, f"{where}: error: {printable(message)}\n")


# ------------------------------------------------------------------------------ sampling


def sampling_flags(parser: FlagParser, batch_size: int = 64) -> FlagGroup:
    """Add the group of flags that `Diffusion.sample` takes, for every script that samples."""
    group = parser.group("Sampling")
    group.add(
        "--sampler",
        help="How the model's field is integrated: euler, heun or sde for rectified flow, ddpm, "
        "ddim or dpm++ for DDPM. Default: euler or ddpm, by the checkpoint's objective.",
    )
    group.add(
        "--num-sampling-steps",
        type=number(int, 1, 100_000),
        metavar="N",
        help="Number of steps from noise to image. Default: the sampler's own.",
    )
    group.add(
        "--cfg-scale",
        type=number(float, 0),
        default=1.5,
        metavar="SCALE",
        help="Scale of classifier-free guidance; 1 turns it off and halves the work.",
    )
    group.add(
        "--cfg-channels",
        type=number(int, 1),
        metavar="C",
        help="Number of channels, from the first, that are guided. Default: 3 for DDPM, as "
        "published, and all for rectified flow.",
    )
    group.add(
        "--cfg-interval",
        nargs=2,
        type=number(float, 0, 1),
        default=[0.0, 1.0],
        metavar=("LOW", "HIGH"),
        help="Times t, 0 = image and 1 = noise, between which guidance is on.",
    )
    group.add(
        "--cfg-rescale",
        type=number(float, 0, 1),
        default=0.0,
        metavar="SHARE",
        help="How far guided predictions get the deviation of unguided ones, against colours that "
        "are too strong; 0.7 is usual.",
    )
    group.add(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="Seed of the noise that sampling starts from and adds on its way.",
    )
    group.add(
        "--batch-size",
        type=number(int, 1, 1_000_000),
        default=batch_size,
        metavar="N",
        help="Number of images drawn at once; more need more memory.",
    )
    return group


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `Diffusion.sample` that `sampling_flags` describe."""
    return {
        "sampler": args.sampler,
        "num_steps": args.num_sampling_steps,
        "cfg_scale": args.cfg_scale,
        "cfg_channels": args.cfg_channels,
        "cfg_interval": tuple(args.cfg_interval),
        "cfg_rescale": args.cfg_rescale,
    }
