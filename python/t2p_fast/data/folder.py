# SPDX-License-Identifier: Apache-2.0
"""A folder of pictures with captions in ``metadata.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from t2p_fast.data.pictures import read_picture


class FolderSample(NamedTuple):
    """A picture ``[size, size, 3]`` uint8 and its caption."""

    image: NDArray[np.uint8]
    caption: str


class CaptionedFolder:
    """Pictures by index, centre-cropped to a square and resized.

    ``metadata.jsonl`` has one JSON object a line with ``file_name``, relative to the folder, and
    ``text``: the layout of the ``imagefolder`` datasets of the hub.

    Raises:
        ValueError: if the folder, a line or a picture is unreadable; the message names it.
    """

    def __init__(self, folder: str | Path, *, size: int = 64) -> None:
        self.folder = Path(folder)
        self.size = size
        path = self.folder / "metadata.jsonl"
        try:
            # Not splitlines(): a caption may hold other line separators than \n.
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a readable file ({error})") from error
        self.entries: list[tuple[str, str]] = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                name, caption = entry["file_name"], entry["text"]
                if not (isinstance(name, str) and isinstance(caption, str)):
                    raise TypeError("not two strings")
                caption.encode()  # half of a surrogate pair is a string, but no text
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}: line {number} is not an object with file_name and text"
                ) from error
            self.entries.append((name, caption))
        if not self.entries:
            raise ValueError(f"{path}: names no pictures")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> FolderSample:
        name, caption = self.entries[index]
        image = read_picture(self.folder / name)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.resize(
            (self.size, self.size),
            Image.Resampling.LANCZOS,
            box=(left, top, left + side, top + side),
        )
        return FolderSample(np.asarray(image), caption)
