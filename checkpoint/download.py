"""Weights on the Hugging Face hub: OWNER/NAME, a folder, or OWNER/NAME/FILE, one file of it."""

import re
from pathlib import Path

from common.errors import FileError
from common.network import why_unreachable

HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(/[\w./-]+)?", re.ASCII)
FOLDER_FILES = ["*.json", "*.safetensors"]  # of ours and of diffusers


def find_weights(path: str | Path) -> Path:
    """Return a path as it is, or where a hub id was downloaded to, now or before.

    What is here counts: RESULTS/RUN is no hub id where there is a folder RESULTS.

    Args:
        path: of a file or folder, or a hub id.

    Raises:
        FileError: it is no path, and as a hub id it can't be downloaded.
    """
    match = HUB_ID.fullmatch(str(path))
    if match is None or Path(path).exists() or Path(path).parts[0] == ".." or (
        Path(Path(path).parts[0]).exists()
    ):  # fmt: skip
        return Path(path)
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    why = why or why_unreachable(constants.ENDPOINT)
    repository, file = match[1], (match[2] or "").strip("/")
    try:
        if file:
            return Path(hf_hub_download(repository, file, local_files_only=bool(why)))
        return Path(
            snapshot_download(repository, allow_patterns=FOLDER_FILES, local_files_only=bool(why))
        )
    except LocalEntryNotFoundError as error:
        raise FileError(
            f"no such file: {path}; as a hub id it can't be downloaded ({why or error})"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileError(f"no such file: {path}; on the hub: {reason}") from error
