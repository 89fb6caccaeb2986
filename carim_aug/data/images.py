"""Image files as grey 8-bit tensors, with errors that name the file."""

import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

from carim_aug.data.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
"""File name endings that count as images, in lower case."""

_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def read_grey(path: str | Path, *, channels: int = 1) -> tv_tensors.Image:
    """The image in a file, as grey.

    Args:
        path: An 8-bit image file in any mode (some files of ChestX-ray14 are RGBA), or a 16-bit grey PNG or TIFF, whose
            0 to 65535 become 0 to 255.
        channels: 1, or 3 equal ones.

    Returns:
        (channels, H, W) uint8.

    Raises:
        DataError: The file is missing, unreadable, truncated, or of another depth.
    """
    try:
        with Image.open(path) as file:
            mode, pixels = file.mode, None
            if mode.startswith("I;16") or (mode == "I" and file.format == "PNG"):  # older Pillow's name for it
                pixels = np.rint(np.array(file) / 257).astype(np.uint8)
            elif mode[0] not in "IF":
                pixels = np.array(file.convert("L"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image file") from error
    except _UNREADABLE as error:
        raise DataError(f"{path}: unreadable image ({error})") from error
    if pixels is None:
        raise DataError(f"{path}: images must be of 8 bits, or grey of 16, got mode {mode}")
    image = torch.from_numpy(pixels)[None]
    return tv_tensors.Image(image if channels == 1 else image.repeat(channels, 1, 1))


def read_size(path: str | Path) -> tuple[int, int]:
    """Height and width of an image, from its header alone.

    Raises:
        DataError: The file is missing or its header is unreadable.
    """
    try:
        with Image.open(path) as file:
            width, height = file.size
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image file") from error
    except _UNREADABLE as error:
        raise DataError(f"{path}: unreadable image ({error})") from error
    return height, width


def check_channels(channels: int) -> None:
    """Nothing, or ValueError if channels is neither 1 nor 3."""
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
