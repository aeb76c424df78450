# SPDX-License-Identifier: Apache-2.0
"""Pictures and captions as training sees them, and sheets of pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from t2p_fast.checkpoints import write_atomically
from t2p_fast.data.folder import CaptionedFolder
from t2p_fast.data.leaves import dead_leaves
from t2p_fast.data.scenes import SceneDataset, Split
from t2p_fast.training.config import DataConfig


class CaptionedPicture(NamedTuple):
    """A picture ``[size, size, 3]`` uint8 and its caption."""

    image: NDArray[np.uint8]
    caption: str


class PictureDataset(Dataset[CaptionedPicture]):
    """The pictures that a :class:`DataConfig` describes."""

    def __init__(self, config: DataConfig, split: Split = "train", seed: int = 0) -> None:
        self.config = config
        self.source: SceneDataset | CaptionedFolder
        if config.source == "scenes":
            self.source = SceneDataset(config.vocabulary, split=split, size=config.size, seed=seed)
        else:
            self.source = CaptionedFolder(config.source, size=config.size)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> CaptionedPicture:
        # Spread evenly: of any 1 / leaves indices in a row, one is a picture of leaves.
        share = self.config.leaves
        if int((index + 1) * share) > int(index * share):
            return CaptionedPicture(dead_leaves(index, self.config.size), "")
        sample = self.source[index]
        return CaptionedPicture(sample.image, sample.caption)

    def captions(self, count: int) -> Iterator[str]:
        """The first ``count`` captions; those of a folder without reading its pictures."""
        if isinstance(self.source, CaptionedFolder):
            return (caption for _, caption in self.source.entries[:count])
        return (self.source[i].caption for i in range(count))


def to_tensor(images: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Pictures ``[h, w, 3]`` uint8 to a batch ``[b, 3, h, w]`` in [-1, 1]."""
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return batch.float() / 127.5 - 1


def to_images(pictures: Tensor) -> NDArray[np.uint8]:
    """A batch ``[b, 3, h, w]`` in [-1, 1] to pictures ``[b, h, w, 3]`` uint8."""
    scaled = (pictures.detach().float().clamp(-1, 1) + 1) * 127.5
    array: NDArray[np.uint8] = scaled.round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return array


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], per picture ``[b]``."""
    error = (a.float().clamp(-1, 1) - b.float()).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp_min(1e-10))


def save_sheet(path: Path, rows: Sequence[NDArray[np.uint8]], scale: int = 2) -> None:
    """Writes rows of pictures ``[b, h, w, 3]`` as one PNG."""
    sheet = np.concatenate([np.concatenate(list(row), 1) for row in rows], 0)
    image = Image.fromarray(sheet)
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    write_atomically(path, lambda temporary: image.save(temporary, "PNG"))
