# SPDX-License-Identifier: Apache-2.0
"""Mean field with a small window of the grid between equal labels, in one call on the CPU.

Sizes: `b` pictures, `n` positions, `v` labels, a window of ``kh x kw``.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from t2p_fast._checks import is_plain
from t2p_fast._library import _C
from t2p_fast.memory import empty_like
from t2p_fast.ops.mrf_graph import (
    GridWeights,
    LabelWeights,
    LowRank,
    PairWeights,
    bad_unary,
    check_labels_known,
)

__all__ = ["Window", "plain_window_mean_field", "window_mean_field", "window_of"]

_ROUNDING = 2.0**-23


class Window(NamedTuple):
    """Weights in the kernel's form.

    Attributes:
        down: ``[kh]`` float32, or None.
        across: ``[1, kw]`` float32, 1 in the middle: the weights are the outer product of `down`
            and this and, for the middle, `middle` more. Without `down` ``[kh, kw]``, the weights.
        middle: see `across`.
        height: rows of the grid.
        width: its columns.
    """

    down: Tensor | None
    across: Tensor
    middle: float
    height: int
    width: int


def window_of(
    table: Tensor, height: int, width: int, scale: float, temperature: float
) -> Window | None:
    """The window of ``scale table``, ``[kh, kw]``, or None where there is no kernel for it.

    That is where the window is large, or messages are so many times the temperature that sums of
    exponentials could overflow without their maximum.
    """
    size = table.shape[0], table.shape[1]
    if max(size) > _C.MRF_MOST_WINDOW or table.is_cuda:
        return None
    weights = tuple(table.detach().flatten().tolist())
    return _window_of(size, weights, height, width, scale, temperature)


@lru_cache(maxsize=16)
def _window_of(
    size: tuple[int, int], weights: tuple[float, ...], height: int, width: int, scale: float,
    temperature: float,
) -> Window | None:  # fmt: skip
    scaled = [scale * weight for weight in weights]
    # Not so either if one of them is a NaN.
    if not sum(map(abs, scaled)) < _C.MRF_MOST_MESSAGE * temperature:
        return None
    kw = size[1]
    rows = [scaled[i : i + kw] for i in range(0, len(scaled), kw)]
    factors = _factors(rows)
    with torch.inference_mode(False), torch.device("cpu"):
        if factors is None:
            return Window(None, torch.tensor(rows, dtype=torch.float32), 0.0, height, width)
        down, across, middle = factors
        return Window(
            torch.tensor(down, dtype=torch.float32),
            torch.tensor([across], dtype=torch.float32),
            middle,
            height,
            width,
        )


def _factors(rows: list[list[float]]) -> tuple[list[float], list[float], float] | None:
    """`Window.down`, `across` and `middle` of weights that are the same in the mirror and, but for
    the middle, of rank one to within the rounding of float32; else None.

    By alternating least squares over all weights but the middle one, which converge at once where
    the rest is of rank one.
    """
    kh, kw = len(rows), len(rows[0])
    # As many products as there are weights, or more, gain nothing.
    if kh + kw + 1 >= sum(weight != 0 for row in rows for weight in row):
        return None
    if any(row != row[::-1] for row in rows) or rows != rows[::-1]:
        return None
    counted = [[(i, j) != (kh // 2, kw // 2) for j in range(kw)] for i in range(kh)]
    largest = max(abs(rows[i][j]) for i in range(kh) for j in range(kw) if counted[i][j])

    def fit(known: list[float], along: list[list[float]], there: list[list[bool]]) -> list[float]:
        fitted = []
        for line, chosen in zip(along, there, strict=True):
            pairs = [(x, k) for x, k, keep in zip(line, known, chosen, strict=True) if keep]
            norm = math.fsum(k * k for _, k in pairs)
            fitted.append(math.fsum(x * k for x, k in pairs) / norm if norm else 0.0)
        return fitted

    transposed = [list(column) for column in zip(*rows, strict=True)]
    counted_across = [list(column) for column in zip(*counted, strict=True)]
    across = max(
        (row for i, row in enumerate(rows) if i != kh // 2),
        key=lambda row: max(map(abs, row)),
        default=rows[0],
    )
    down: list[float] = []
    for _ in range(4):
        down = fit(across, rows, counted)
        across = fit(down, transposed, counted_across)
    # The kernel saves the product with the middle one.
    unit = across[kw // 2]
    if not abs(unit) * 1e6 > max(map(abs, across)):
        return None
    down, across = [x * unit for x in down], [x / unit for x in across]
    unlike = max(
        abs(down[i] * across[j] - rows[i][j]) for i in range(kh) for j in range(kw) if counted[i][j]
    )
    if not unlike <= _ROUNDING * largest:
        return None
    return down, across, rows[kh // 2][kw // 2] - down[kh // 2] * across[kw // 2]


def plain_window_mean_field(
    unary: Tensor, w_s: PairWeights, w_c: LabelWeights, known: Tensor | None, iterations: int,
    damping: float, temperature: float,
) -> Tensor | None:  # fmt: skip
    """`window_mean_field` for checked arguments of `mrf_mean_field`, past torch's dispatcher.

    After some megabytes of labels the code of dispatcher and conversions is no longer in the cache,
    and costs as much as half an iteration. None where there is no kernel, or the call is not plain.
    """
    if not isinstance(w_s, GridWeights) or isinstance(w_c, (Tensor, LowRank)) or damping != 0:
        return None
    if unary.device.type != "cpu" or not is_plain(unary, w_s.table, known):
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    return window_mean_field(unary, w_s, w_c, known, iterations, temperature)


def window_mean_field(
    unary: Tensor, w_s: GridWeights, w_c: float, known: Tensor | None, iterations: int,
    temperature: float,
) -> Tensor | None:  # fmt: skip
    """`mrf_mean_field` with a small window and Potts label weights, or None: see `window_of`.

    All of it is one call: labels are taken in strips that stay in a processor's cache from
    iteration to iteration, and a window of rank one takes ``kh + kw`` products in place of
    ``kh kw``. Softmax is without its maximum, as messages are bounded: strips exchange sums alone.

    Args:
        unary: ``[b, n, v]``, on the CPU.
        w_s: a table ``[kh, kw]`` for `n` positions.
        w_c: weight of two labels that are equal.
        known: ``[b, n]`` int64, or None.
        iterations: at least 1.
        temperature: of every softmax.

    Returns:
        ``q``, ``[b, n, v]`` in the dtype of `unary`.

    Raises:
        ValueError: as `mrf_mean_field`.

    Complexity:
        ``O(iterations b n v (kh + kw))``, or times the weights that aren't 0.
    """
    if unary.numel() == 0:
        return None
    window = window_of(w_s.table, w_s.height, w_s.width, float(w_c), float(temperature))
    if window is None:
        return None
    check_labels_known(known, unary.shape[2])
    scores = unary if unary.dtype == torch.float32 else unary.float()
    scores = scores if scores.is_contiguous() else scores.contiguous()
    q = empty_like(scores)
    bad = _C.mrf_window(
        scores, None if known is None else known.contiguous(), window.height, window.width,
        window.down, window.across, window.middle, iterations, temperature, q,
        torch.get_num_threads(),
    )  # fmt: skip
    if bad >= 0:
        raise bad_unary(bad % unary.shape[1])
    return q if q.dtype == unary.dtype else q.to(unary.dtype)
