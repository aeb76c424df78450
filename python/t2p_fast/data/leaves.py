# SPDX-License-Identifier: Apache-2.0
"""Dead leaves: discs of random colour and scale that cover each other.

Their edges, scales and colours follow the statistics of natural photographs (Lee, Mumford and
Huang, "Occlusion models for natural images", 2001), so a tokenizer that has seen them can also
take in a photo without a single photo in its training set.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw


def dead_leaves(index: int, size: int = 64, *, seed: int = 0) -> NDArray[np.uint8]:
    """Draws picture ``index`` as ``[size, size, 3]``; the same on every machine.

    Radii follow the scale-invariant power law r^-3 between ``size / 12`` and ``size``; half of
    the pictures carry a linear gradient of light, as a lit surface would.
    """
    rng = np.random.default_rng((seed, index))
    low, high = size / 12, size
    count = 120
    u = rng.random(count)
    radii = (low**-2 - u * (low**-2 - high**-2)) ** -0.5
    centres = rng.uniform(-0.2 * size, 1.2 * size, (count, 2))
    # Leaves share a tint and differ in brightness more than in hue, as the things in a photo do.
    tint = np.clip(rng.normal(128, 50) + rng.normal(0, 30, 3), 0, 255)
    spread = rng.normal(0, 55, (count, 1)) + rng.normal(0, 25, (count, 3))
    colors = np.clip(tint + spread, 0, 255).astype(np.uint8)
    scale = 2
    canvas = Image.new("RGB", (size * scale, size * scale), tuple(int(c) for c in tint))
    draw = ImageDraw.Draw(canvas)
    for (x, y), radius, color in zip(centres * scale, radii * scale, colors, strict=True):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(color.tolist()))
    image = np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float32)
    slope = rng.normal(0, 30, 2) * (rng.random() < 0.5)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    light = slope[0] * ramp[:, None] + slope[1] * ramp[None, :]
    lit: NDArray[np.uint8] = np.clip(image + light[..., None], 0, 255).astype(np.uint8)
    return lit
