"""What files say about their weights, as JSON: read with every type checked, since anyone wrote it.

In this order: `read_json`, `parse_json`, `read_config`, `read_settings`, `save_description`,
`read_description` (the JSON beside a published file, which has no place for a config).
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import FileError, UserError, blamed_on
from common.files import atomic_write
from data.latent_index import is_norm
from models import DiTConfig

FORMAT = "dit-moe config"
SETTINGS_TYPES = {
    "objective": str,
    "vae_path": str,
    "data_path": str,
    "fashion_mnist_root": str,
    "image_size": int,
    "time_scale": float,
    "time_shift": float,
    "time_sampling": list,
    "prediction": str,
    "zero_terminal_snr": bool,
    "min_snr_gamma": float,
    "ema_decay": float,
    "ema_decays": list,
    "class_names": list,
    "latent_stats": dict,
}


def parse_json(text: str, source: str | Path) -> dict[str, Any]:
    """Return the object that a JSON text holds.

    Args:
        text: JSON.
        source: where it stands, for messages.

    Raises:
        FileError: it is damaged, or no object.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{source} is damaged: {error}") from error
    return _expect(content, dict, "", source)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        FileError: it cannot be read, is damaged, or holds no object.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    return parse_json(text, path)


def read_config(content: Any, source: str | Path) -> DiTConfig:
    """Return a `DiTConfig` of its fields.

    Raises:
        FileError: a field is unknown or of another type.
        UserError: a field is out of range.
    """
    fields = check_fields(_expect(content, dict, "config", source), source)
    with blamed_on(str(source)):
        return DiTConfig.from_dict(fields)


def check_fields(fields: Mapping[str, Any], source: str | Path) -> dict[str, Any]:
    """Return config fields whose types are those of `DiTConfig`; unknown ones pass.

    Raises:
        FileError: naming the first field that is of another type.
    """
    kinds = {field.name: type(field.default) for field in dataclasses.fields(DiTConfig)}
    for name, value in fields.items():
        _expect(value, kinds.get(name, object), name, source)
    return dict(fields)


def read_settings(content: Any, source: str | Path) -> dict[str, Any]:
    """Return the settings of a run; those that say nothing (None) are as if they were not there.

    Raises:
        FileError: one of those that are read here is of another type or value.
    """
    settings = _expect(content, dict, "settings", source)
    for name, kind in SETTINGS_TYPES.items():
        if settings.get(name) is not None:
            _expect(settings[name], kind, name, source)
    for name in settings.get("class_names") or []:
        _expect(name, str, "class_names", source)
    if (norm := settings.get("latent_stats")) is not None:
        mean = norm.get("mean")
        if not isinstance(mean, list) or not is_norm(norm, len(mean)):
            raise FileError(f"{source}: latent_stats is not mean and std of each channel")
    if settings.get("objective") not in (None, "rf", "ddpm"):
        raise FileError(f"{source}: objective {settings['objective']!r} is neither rf nor ddpm")
    return settings


def _expect(value: Any, kind: type, name: str, source: str | Path) -> Any:
    """Return a value of a type; an int is a float too, but a bool is no number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    kinds = (list, tuple) if kind is tuple else kind  # JSON has lists only
    fits = isinstance(value, kinds) and isinstance(value, bool) == (kind is bool)
    if kind is object or fits or (kind is float and is_number):
        return value
    text = json.dumps(value, default=str)
    shown = text if len(text) <= 40 else f"{text[:37]}..."
    expected = {"dict": "an object", "list": "a list", "tuple": "a list", "str": "a text"}.get(
        kind.__name__, ""
    )
    raise FileError(
        f"{source}: {name + ' ' if name else ''}{shown} is not {expected or kind.__name__}"
    )


# ------------------------------------------------------------------------------ published files


def description_path(path: str | Path) -> Path:
    """Return where the config of a published file lies: NAME.json beside NAME.pt."""
    return Path(path).with_suffix(".json")


def save_description(path: str | Path, config: DiTConfig, settings: Mapping[str, Any]) -> None:
    """Write config and settings beside a published file at `path`."""
    content = {"format": FORMAT, "config": config.to_dict(), "settings": dict(settings)}
    with atomic_write(description_path(path)) as temp:
        temp.write_text(json.dumps(content, indent=2) + "\n")


def read_description(path: Path) -> tuple[DiTConfig | None, dict[str, Any]]:
    """Return the config and settings that lie beside a published file, (None, {}) if none do.

    Raises:
        UserError: they are damaged.
    """
    beside = description_path(path)
    if beside == path or not beside.is_file():
        return None, {}
    try:
        content = read_json(beside)
    except UserError:
        if FORMAT in beside.read_text(errors="replace"):
            raise
        return None, {}  # somebody else's file
    if content.get("format") != FORMAT:
        return None, {}
    settings = read_settings(content.get("settings", {}), beside)
    return read_config(content.get("config"), beside), settings
