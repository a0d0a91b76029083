"""Flags from a file, `--config FILE`: a recipe, or the args.json of a run.

A file is JSON or YAML, by its ending: flag names, with - or _, and their values. It is put before
the command line, which so wins.
"""

import argparse
import difflib
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from common.errors import FileError, UserError
from common.flags import FlagParser

FLAG = "--config"
# What args.json says beside flags: found again from the data, or another way to say --rf.
FOUND_AGAIN = ("class_names", "data_fingerprint", "latent_stats")


class ConfigParser(FlagParser):
    """Parser of flags that also stand in files.

    Attributes:
        passed_over: spellings of another script's flags, which a file may have too.
    """

    passed_over: Collection[str] = ()

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse what the files say, then the command line.

        Raises:
            FileError: a file cannot be read, or is no list of names and values.
            UserError: it names an unknown flag, or a value that no flag takes.
        """
        words = list(sys.argv[1:] if args is None else args)
        from_files: list[str] = []
        rest: list[str] = []
        while words:
            name, equals, value = (word := words.pop(0)).partition("=")
            if name == FLAG and (equals or words):
                from_files += self._words_of(Path(value if equals else words.pop(0)))
            else:
                rest.append(word)
        return super().parse_known_args([*from_files, *rest], namespace)

    def _words_of(self, path: Path) -> Iterator[str]:
        """Return what a file says as words of a command line."""
        content = read_config_file(path)
        if "data_fingerprint" in content:  # an args.json
            content = flags_of_run(content, with_engine="--deepspeed-config" in self.spellings)
        for name, value in content.items():
            spelling = "--" + name.replace("_", "-")
            if spelling not in self.spellings and spelling in self.passed_over:
                continue
            if spelling not in self.spellings or spelling == FLAG:
                raise UserError(f"{path}: unknown name {name!r}; {self._nearest(spelling)}")
            if value is None:  # as by default
                continue
            values = value if isinstance(value, list) else [value]
            if not all(isinstance(one, str | int | float) for one in values):
                raise UserError(f"{path}: {name} is {json.dumps(value)}, which no flag takes")
            yield from (
                [spelling, *map(str, values)]
                if len(values) > 1
                else [f"{spelling}={one}" for one in values or ["none"]]
            )

    def _nearest(self, spelling: str) -> str:
        near = difflib.get_close_matches(spelling, self.spellings, 1)
        return f"did you mean {self.spellings[near[0]][2:]}?" if near else "--help lists all flags"


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the names and values in a JSON or YAML file.

    Raises:
        FileError: it cannot be read, or is something else.
    """
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise FileError(f"{FLAG} {path}: its name must end in .json, .yaml or .yml")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{FLAG} {path} cannot be read: {error}") from error
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise FileError(f"{FLAG} {path} is damaged: {reason}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise FileError(f"{FLAG} {path} is no list of flag names and values")
    return content


def flags_of_run(settings: Mapping[str, Any], *, with_engine: bool) -> dict[str, Any]:
    """Return the flags that a run's settings tell.

    Args:
        settings: of args.json.
        with_engine: keep the engine's file, which train.py knows nothing of.
    """
    left_out = {*FOUND_AGAIN, "objective", *([] if with_engine else ["deepspeed_config"])}
    if settings.get("micro_batch_size"):  # follows from it on any number of ranks
        left_out.add("accum_steps")
    flags = {name: value for name, value in settings.items() if name not in left_out}
    if several := flags.pop("ema_decays", None):
        flags["ema_decay"] = several
    return {**flags, "rf": settings.get("objective") == "rf"}
