"""Image files on disk: which ones a folder has, and how one becomes RGB.

Only regular files are images, and each folder is entered once however many links lead to it.
"""

import io
import os
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import FileError, UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # whatever a file's name says
MAX_PIXELS = 2**27  # of one image, 400 MB in RGB: a larger one is refused before it is decoded


class UnreadableImageError(FileError):
    """A broken image file, or one of a kind that has no meaning as RGB; the message names it."""


# ------------------------------------------------------------------------------ folders


def list_images(folder: str | Path, entered: set[tuple[int, int]] | None = None) -> list[str]:
    """Return the image files below a folder, sorted by folder and name.

    Links are followed, to each folder once. A link to nothing is listed, so that reading it says
    what is missing; pipes and devices are not.

    Args:
        folder: where to look.
        entered: device and inode of folders not to enter; those entered are added.

    Raises:
        OSError: a folder can't be read.
    """
    entered = set() if entered is None else entered
    found: list[tuple[str, str]] = []
    folders = [str(folder)]
    links: list[str] = []
    while folders or links:
        current = folders.pop() if folders else links.pop(0)  # through a link only at last
        info = os.stat(current)
        if (info.st_dev, info.st_ino) in entered and current != str(folder):
            continue
        entered.add((info.st_dev, info.st_ino))
        for entry in sorted(os.scandir(current), key=lambda entry: entry.name):
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(entry.path)
            elif entry.name.lower().endswith(EXTENSIONS):
                missing = entry.is_symlink() and not os.path.exists(entry.path)
                if entry.is_file() or missing:
                    found.append((current, entry.name))
    return [os.path.join(*names) for names in sorted(found)]


def list_classes(root: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """Return the class names and (file, class) pairs of a folder with one subfolder per class.

    Classes are the subfolders in alphabetical order.

    Raises:
        UserError: no subfolders, one without images, or two that are the same folder.
        OSError: a folder can't be read.
    """
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not names:
        raise UserError(f"{root} has no class folders, that is subfolders of images")
    places: dict[tuple[int, int], str] = {}
    for name in names:
        info = os.stat(root / name)
        other = places.setdefault((info.st_dev, info.st_ino), name)
        if other != name:
            raise UserError(f"{root}: {other!r} and {name!r} are one folder, but two classes")
    info = os.stat(root)
    entered = {*places, (info.st_dev, info.st_ino)}
    samples: list[tuple[str, int]] = []
    for label, name in enumerate(names):
        files = list_images(root / name, entered)
        if not files:
            raise UserError(f"{root}: no images in the class folder {name!r}")
        samples += [(file, label) for file in files]
    return names, samples


# ------------------------------------------------------------------------------ one file


def read_image(path: str | Path) -> Image.Image:
    """Return an image in 8-bit RGB; gray levels of 16 bits are scaled and rounded, v / 257.

    Of 16-bit colours the upper 8 bits count.

    Raises:
        UnreadableImageError: broken, too large, not a regular file or without a meaning as RGB.
        FileError: it can't be opened.
    """
    with _open(path) as image:
        return _to_rgb(image, path)


def _to_rgb(image: Image.Image, path: str | Path) -> Image.Image:
    try:
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format != "TIFF"):
            levels = np.asarray(image).astype(np.uint32)
            return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            kind = "32-bit integers" if image.mode == "I" else "floating point numbers"
            raise UnreadableImageError(
                f"cannot read the image file {path}: its pixels are {kind}, whose white is "
                "unknown; save it with 8 or 16 bits"
            )
        return image.convert("RGB")
    except UnreadableImageError:
        raise
    except Exception as error:  # PIL raises many types for a broken file
        raise _told(path, error) from error


def size_of(path: str | Path) -> tuple[int, int]:
    """Return width and height in pixels, from the file's header alone.

    Raises: as `read_image`.
    """
    with _open(path) as image:
        return image.size


def _open(path: str | Path, content: bytes | None = None) -> Image.Image:
    """Read the header of a file, or its content; refuse what would hang or fill the memory."""
    try:
        regular = content is not None or stat.S_ISREG(os.stat(path).st_mode)
        if not regular:
            raise UnreadableImageError(f"cannot read the image file {path}: not a regular file")
        with warnings.catch_warnings():  # PIL's about large images: these are refused below
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path if content is None else io.BytesIO(content), formats=FORMATS)
    except UnreadableImageError:
        raise
    except Image.UnidentifiedImageError as error:
        formats = ", ".join(FORMATS)
        raise UnreadableImageError(f"cannot read the image file {path}: not {formats}") from error
    except Exception as error:
        raise _told(path, error) from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise UnreadableImageError(
            f"cannot read the image file {path}: {image.width} x {image.height} pixels, at most "
            f"{MAX_PIXELS:,} are decoded; scale it down"
        )
    return image


def _told(path: str | Path, error: Exception) -> FileError:
    """Tell what the operating system refused, such as a permission, from a broken file."""
    if isinstance(error, OSError) and error.errno is not None:
        return FileError(f"cannot read the image file {path}: {error.strerror}")
    return UnreadableImageError(f"cannot read the image file {path}: {error}")


def center_crop(image: Image.Image, image_size: int) -> Image.Image:
    """Resize the shorter side to image_size and cut the central square.

    Halving with a box filter first keeps the final bicubic step from aliasing.

    Source: ADM's preprocessing (arXiv:2105.05233), which the FID reference batches use.
    """
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))


def read_square(path: str | Path, image_size: int) -> np.ndarray:
    """Return an image as its central square, (S, S, 3) uint8.

    Raises: as `read_image`.
    """
    return _square(read_image(path), path, image_size)


def square_of_bytes(content: bytes, name: str, image_size: int) -> np.ndarray:
    """Return what `read_square` returns of a file with this content; `name` is for messages."""
    with _open(name, content) as image:
        return _square(_to_rgb(image, name), name, image_size)


def _square(image: Image.Image, path: str | Path, image_size: int) -> np.ndarray:
    if image_size**2 * max(image.size) > MAX_PIXELS * min(image.size):
        raise UnreadableImageError(
            f"cannot read the image file {path}: {image.width} x {image.height} pixels are too "
            f"narrow to be scaled to {image_size}"
        )
    return np.array(center_crop(image, image_size))


def same_size(paths: Sequence[str | Path]) -> tuple[int, int]:
    """Return the width and height that all files have, reading headers only.

    Raises:
        UserError: two differ.
        FileError: as `read_image`.
    """
    first = size_of(paths[0])
    for path in paths[1:]:
        if (size := size_of(path)) != first:
            raise UserError(
                f"{path} has {size[0]} x {size[1]} pixels, {paths[0]} {first[0]} x {first[1]}: "
                "images must be of one size; --image-size S crops them"
            )
    return first
