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

    def __init__(self, docstring: str | None) -> None:
        super().__init__(description=docstring, formatter_class=_HelpFormatter, allow_abbrev=False)

    def group(self, title: str) -> FlagGroup:
        """Start a group of flags."""
        return FlagGroup(self.add_argument_group(title))
