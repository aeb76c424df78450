# SPDX-License-Identifier: Apache-2.0
"""Pictures from files, whatever their format, as 8-bit RGB."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def read_picture(path: str | Path) -> Image.Image:
    """Reads a picture, upright as its EXIF block says, as RGB.

    Raises:
        ValueError: if there is no readable picture; the message names the file.
    """
    try:
        # What PIL warns of (many pixels, a palette's transparency, EXIF) does no harm here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as file:
                # These formats have 16 bits at most, even where PIL makes 32 of them.
                sixteen = file.mode.startswith("I;16") or (
                    file.mode == "I" and file.format in ("PNG", "PPM")
                )
                return to_rgb(_upright(file), sixteen_bits=sixteen)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise anything at damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not a readable picture ({reason})") from error


def to_rgb(image: Image.Image, *, sixteen_bits: bool | None = None) -> Image.Image:
    """A picture as 8-bit RGB; 16-bit gray is scaled, which ``Image.convert`` would clip to white.

    Args:
        image: of any mode but 32-bit numbers, whose white could be anywhere.
        sixteen_bits: whether the values go to 65535; ``None`` goes by the mode.

    Raises:
        ValueError: for a picture of 32-bit numbers.
    """
    if sixteen_bits is None:
        sixteen_bits = image.mode.startswith("I;16")
    if sixteen_bits:
        values = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode is {image.mode}, 32-bit numbers, expected 8 or 16 bits a channel")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        # A broken EXIF block says nothing of the pixels; if it is they that are broken, they are
        # so again when they are converted.
        return image
