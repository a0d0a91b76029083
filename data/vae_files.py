"""Files of an autoencoder: found in a folder or on the hub, and what their config.json says.

In order: `find_vae` and how it looks on the hub, `check_config`.
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError
from common.network import why_unreachable


class VaeFiles(NamedTuple):
    """Where a VAE is in a folder or hub repository."""

    subfolder: str  # "" or, in a pipeline, "vae"
    config: Any  # what its config.json says
    downloaded: bool  # before: nothing is to be asked of the hub


def find_vae(vae_path: str) -> VaeFiles:
    """Find the config.json of a folder or hub id, or of its subfolder "vae".

    Raises:
        UserError: there is none, or it is damaged.
    """
    if Path(vae_path).is_dir():
        for subfolder in ("", "vae"):
            if (file := Path(vae_path, subfolder, "config.json")).is_file():
                return VaeFiles(subfolder, _read_json(file, vae_path), True)
        raise UserError(
            f"--vae-path {vae_path} does not load: no config.json in it, nor in {vae_path}/vae"
        )
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", vae_path) is None:
        raise UserError(
            f"--vae-path {vae_path} is not a folder; it accepts a folder saved by diffusers "
            "(config.json and weights), a hub id such as stabilityai/sd-vae-ft-mse, or none"
        )
    return _find_on_hub(vae_path)


def _read_json(file: str | Path, vae_path: str) -> Any:
    try:
        return json.loads(Path(file).read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"--vae-path {vae_path}: {file} is damaged: {error}") from error


def _find_on_hub(vae_path: str) -> VaeFiles:
    """Find config.json; without a network, what was downloaded before counts.

    Raises:
        UserError: neither downloaded nor to be had now.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    tried = f"--vae-path {vae_path}: no such folder, and as a hub id"
    instead = "give a folder saved by diffusers (config.json and weights), or none"
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    why = why or why_unreachable(constants.ENDPOINT)
    files = {subfolder: f"{subfolder}/config.json".lstrip("/") for subfolder in ("", "vae")}
    for subfolder, name in files.items() if why else ():
        if isinstance(file := try_to_load_from_cache(vae_path, name), str):
            return VaeFiles(subfolder, _read_json(file, vae_path), True)
    if why:
        raise UserError(f"{tried} it can't be downloaded ({why}): {instead}")
    for subfolder, name in files.items():
        try:
            file = hf_hub_download(vae_path, name)
            return VaeFiles(subfolder, _read_json(file, vae_path), False)
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{tried} it can't be downloaded ({reason}): {instead}") from error
    raise UserError(f"{tried} it has no config.json, nor one in vae: {instead}")


def check_config(config: Any, vae_path: str | Path, accepted: Iterable[str]) -> str:
    """Return the class that a config.json names; refuse what would load with another meaning.

    Raises:
        UserError: naming what is wrong, or not supported.
    """
    if not isinstance(config, dict):
        raise UserError(f"--vae-path {vae_path} does not load: its config.json is no object")
    name = config.get("_class_name")
    if name not in list(accepted):
        raise UserError(
            f"--vae-path {vae_path} is of class {name}; supported are {', '.join(accepted)}"
        )
    for entry in ("scaling_factor", "shift_factor"):
        value = config.get(entry)
        if (value is not None and not _is_number(value)) or (
            value == 0 and entry == "scaling_factor"
        ):
            raise UserError(f"--vae-path {vae_path}: its config.json has {entry} {value!r}")
    if name == "AutoencoderKL":
        _check_channels(config, vae_path)
    return name


def _check_channels(config: dict[str, Any], vae_path: str | Path) -> None:
    """Refuse a scale for each channel that is none."""
    found: dict[str, Any] = {entry: config.get(entry) for entry in ("latents_mean", "latents_std")}
    if found == {"latents_mean": None, "latents_std": None}:
        return
    for entry, values in found.items():
        right = isinstance(values, list) and all(map(_is_number, values))
        if not right or len(values) != config.get("latent_channels", 4):
            raise UserError(
                f"--vae-path {vae_path}: its config.json has {entry} {values!r:.60}, not one "
                "number for each latent channel, as latents_mean and latents_std together are"
            )
    if config.get("shift_factor") or 0.0 in found["latents_std"]:
        raise UserError(
            f"--vae-path {vae_path}: its config.json has latents_std {found['latents_std']!r:.60} "
            f"and shift_factor {config.get('shift_factor')}: no 0, and one of the two"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
