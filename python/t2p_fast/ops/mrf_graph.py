# SPDX-License-Identifier: Apache-2.0
"""How the pair weights of a Markov random field are given, and what the solvers make of them.

Pairs of positions: a matrix ``[n, n]``, a `GridWeights` table over offsets, or a sparse CSR matrix.
Pairs of labels: a matrix ``[v, v]``, a `LowRank` pair, or a number (Potts: equal labels or not).
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from t2p_fast._checks import describe

__all__ = [
    "Edges",
    "GridWeights",
    "LabelWeights",
    "LowRank",
    "PairWeights",
    "codebook_labels",
    "grid_neighbours",
]


class GridWeights(NamedTuple):
    """Weights that depend on the offset between two positions of a ``height x width`` grid.

    Attributes:
        table: ``[kh, kw]``, odd: ``table[kh // 2 + dy, kw // 2 + dx]`` is the weight with which
            position ``(y, x)`` listens to ``(y + dy, x + dx)``. As large as ``[2 h - 1, 2 w - 1]``
            it reaches every pair; smaller, a window.
        height: rows of the grid; positions are counted row by row.
        width: its columns.
    """

    table: Tensor
    height: int
    width: int


class LowRank(NamedTuple):
    """Label weights ``W_c = a b^T``.

    Attributes:
        a: ``[v, r]``.
        b: ``[v, r]``.
    """

    a: Tensor
    b: Tensor


PairWeights = Tensor | GridWeights
LabelWeights = Tensor | LowRank | float


class Edges(NamedTuple):
    """Directed edges by the position they start from, as in a CSR matrix.

    Attributes:
        begin: ``[n + 1]`` int64.
        node: ``[e]`` int64, where they lead.
        weight: ``[e]`` float32.
    """

    begin: Tensor
    node: Tensor
    weight: Tensor


def grid_neighbours(
    height: int,
    width: int,
    *,
    connectivity: int = 4,
    weight: float = 1.0,
    diagonal_weight: float | None = None,
) -> GridWeights:
    """The 4 or 8 nearest neighbours on a grid, all with one weight.

    Args:
        height: rows of the grid.
        width: its columns.
        connectivity: 4 or 8.
        weight: of a neighbour beside, above or below.
        diagonal_weight: of a diagonal one; `weight` if not given.
    """
    if connectivity not in (4, 8):
        raise ValueError(f"grid_neighbours: connectivity is {connectivity}, expected 4 or 8")
    corner = 0.0
    if connectivity == 8:
        corner = weight if diagonal_weight is None else diagonal_weight
    rows = [[corner, weight, corner], [weight, 0.0, weight], [corner, weight, corner]]
    return GridWeights(torch.tensor(rows, dtype=torch.float32), height, width)


def codebook_labels(codebook: Tensor, *, scale: float, truncation: float, p: float = 2.0) -> Tensor:
    """Label weights that fall with the distance of two codes, down to a floor: a metric.

    ``W_c[a, b] = -scale min(|c_a - c_b|_p, truncation)``.

    Args:
        codebook: ``[v, d]``.
        scale: at least 0.
        truncation: the distance beyond which all labels are equally unlike.
        p: 1 or 2.
    """
    if codebook.ndim != 2 or not codebook.is_floating_point():
        raise ValueError(
            f"codebook_labels: codebook must be [v, d] of floating point, got "
            f"{list(codebook.shape)} of {codebook.dtype}"
        )
    exact = "donot_use_mm_for_euclid_dist"  # the expanded square is not 0 between equal codes
    return -scale * torch.cdist(codebook, codebook, p, exact).clamp_max(truncation)


# For the ops --------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def grid_structure(
    size: tuple[int, int], height: int, width: int, kept: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """`Edges.begin` and `Edges.node` of a grid, and the number in the table of every edge."""
    with torch.inference_mode(False), torch.device("cpu"):
        kh, kw = size
        entry = torch.tensor(kept, dtype=torch.int64)
        dy, dx = entry // kw - kh // 2, entry % kw - kw // 2
        y = torch.arange(height)[:, None, None] + dy
        x = torch.arange(width)[None, :, None] + dx
        there = ((y >= 0) & (y < height) & (x >= 0) & (x < width)).flatten(0, 1)
        node = (y * width + x).flatten(0, 1)[there]
        begin = torch.cat([torch.zeros(1, dtype=torch.int64), there.sum(1).cumsum(0)])
        return begin, node, entry.expand(height * width, -1)[there].contiguous()


def offset_index(
    size: tuple[int, int], height: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """For every pair of positions its number in the table, ``[n, n]``, and whether it has one."""
    kh, kw = size
    position = torch.arange(height * width, device=device)
    y, x = position // width, position % width
    row, column = y[None] - y[:, None] + kh // 2, x[None] - x[:, None] + kw // 2
    inside = (row >= 0) & (row < kh) & (column >= 0) & (column < kw)
    return torch.where(inside, row * kw + column, 0), inside


def dense_grid(table: Tensor, height: int, width: int) -> Tensor:
    """The matrix ``[n, n]`` of a table of offsets."""
    index, inside = offset_index((table.shape[0], table.shape[1]), height, width, table.device)
    return torch.where(inside, table.flatten()[index], 0)


def window_edges(table: Tensor, height: int, width: int) -> Edges:
    """Those of a table whatever its weights are: on a GPU, to look would mean to wait.

    Every position has as many. Edges over the border lead back to it, with weight 0.
    """
    kh, kw = table.shape
    here = torch.arange(height * width, device=table.device)[:, None]
    entry = torch.arange(kh * kw, device=table.device)
    y = here // width + entry // kw - kh // 2
    x = here % width + entry % kw - kw // 2
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    node = torch.where(inside, y * width + x, here)
    weight = torch.where(inside, table.detach().float().flatten(), 0)
    begin = torch.arange(0, node.numel() + 1, kh * kw, device=table.device)
    return Edges(begin, node.flatten(), weight.flatten())


def grid_edges(table: Tensor, height: int, width: int, *, self_edges: bool = True) -> Edges:
    """The edges of a table's non-zero weights."""
    size = table.shape[0], table.shape[1]
    flat = table.detach().float().flatten()
    if not table.is_cuda and len(flat) <= _SMALL_TABLE:
        return _edges_of(size, height, width, tuple(flat.tolist()), self_edges)
    chosen = flat != 0
    if not self_edges:
        chosen[size[0] // 2 * size[1] + size[1] // 2] = False
    kept = tuple(chosen.nonzero()[:, 0].tolist())
    begin, node, entry = (t.to(table.device) for t in grid_structure(size, height, width, kept))
    return Edges(begin, node, flat[entry])


_SMALL_TABLE = 81  # up to windows of 9 x 9


@lru_cache(maxsize=16)
def _edges_of(
    size: tuple[int, int], height: int, width: int, weights: tuple[float, ...], self_edges: bool
) -> Edges:
    """Those of a small table: to look them up takes a hundredth of the time to make them."""
    middle = size[0] // 2 * size[1] + size[1] // 2
    kept = tuple(i for i, x in enumerate(weights) if x != 0 and (self_edges or i != middle))
    with torch.inference_mode(False), torch.device("cpu"):
        begin, node, entry = grid_structure(size, height, width, kept)
        return Edges(begin, node, torch.tensor(weights, dtype=torch.float32)[entry])


@lru_cache(maxsize=16)
def _all_pairs(n: int) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.device("cpu"):
        return torch.arange(0, n * n + 1, max(n, 1)), torch.arange(n).repeat(n)


def all_edges(matrix: Tensor) -> Edges:
    """Those of a matrix ``[n, n]`` on a CPU with its zeros and its diagonal."""
    return Edges(*_all_pairs(len(matrix)), matrix.detach().float().flatten())


def dense_edges(w_s: Tensor) -> Edges:
    """The edges of a matrix's non-zero weights, but those from a position to itself."""
    n = w_s.shape[0]
    weights = w_s.detach().float()
    there = (weights != 0) & ~torch.eye(n, dtype=torch.bool, device=w_s.device)
    begin = torch.cat([there.new_zeros(1, dtype=torch.int64), there.sum(1).cumsum(0)])
    return Edges(begin, there.nonzero()[:, 1].contiguous(), weights[there])


def csr_edges(begin: Tensor, node: Tensor, weight: Tensor, *, self_edges: bool) -> Edges:
    """The edges of a CSR matrix."""
    edges = Edges(begin, node, weight.detach().float())
    # torch checks the indices of a sparse tensor only on demand. Solvers wait for a device anyhow.
    if not (begin.is_cuda and self_edges):
        sound = (
            int(begin[0]) == 0 and int(begin[-1]) == len(node) and bool((begin.diff() >= 0).all())
        )
        if not sound or (
            len(node) and not 0 <= int(node.min()) <= int(node.max()) < len(begin) - 1
        ):
            raise ValueError("mrf: w_s is not a sound CSR matrix: an index is out of range")
    if self_edges:
        return edges
    start = edge_starts(begin)
    keep = node != start
    if bool(keep.all()):
        return edges
    counts = torch.zeros_like(begin[1:]).index_add_(0, start[keep], torch.ones_like(start[keep]))
    begin = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Edges(begin, node[keep], edges.weight[keep])


def edge_starts(begin: Tensor) -> Tensor:
    """The position that every edge starts from, ``[e]``."""
    return torch.repeat_interleave(begin.diff())


def reverse_edges(op: str, edges: Edges) -> Tensor:
    """The number of the edge back, for every edge.

    Raises:
        ValueError: an edge has none, or one of another weight.
    """
    n = edges.begin.shape[0] - 1
    start = edge_starts(edges.begin)
    order = (start * n + edges.node).argsort()
    forth = (start * n + edges.node)[order]
    back = edges.node * n + start
    found = torch.searchsorted(forth, back).clamp_max(max(len(forth) - 1, 0))
    reverse = order[found]
    if not (torch.equal(forth[found], back) and torch.equal(edges.weight[reverse], edges.weight)):
        raise ValueError(f"{op}: w_s must be symmetric: pass (w_s + w_s.T) / 2")
    return reverse


def check_pairs(op: str, w_s: PairWeights, n: int, device: torch.device) -> None:
    """Raises ValueError or TypeError unless `w_s` holds weights for `n` positions."""
    if isinstance(w_s, GridWeights):
        table, height, width = w_s
        check_floats(op, "w_s.table", table, device)
        if table.ndim != 2 or table.shape[0] % 2 == 0 or table.shape[1] % 2 == 0:
            raise ValueError(
                f"{op}: w_s.table must be [kh, kw] with odd sizes, got {list(table.shape)}"
            )
        if height * width != n or height < 1:
            raise ValueError(
                f"{op}: w_s is for a grid of {height} x {width}, but unary has n = {n}"
            )
        return
    if not isinstance(w_s, Tensor):
        raise TypeError(f"{op}: w_s must be a tensor or GridWeights, got {describe(w_s)}")
    if w_s.layout not in (torch.strided, torch.sparse_csr):
        raise TypeError(f"{op}: w_s must be dense or sparse CSR, got {describe(w_s)}")
    check_floats(op, "w_s", w_s, device)
    if list(w_s.shape) != [n, n]:
        raise ValueError(f"{op}: w_s is {list(w_s.shape)}, but unary has n = {n}")


def check_labels(op: str, w_c: LabelWeights, v: int, device: torch.device) -> None:
    """Raises ValueError or TypeError unless `w_c` holds weights for `v` labels."""
    if isinstance(w_c, LowRank):
        for name, part in (("w_c.a", w_c.a), ("w_c.b", w_c.b)):
            check_floats(op, name, part, device)
            if part.ndim != 2 or part.shape[0] != v or part.shape != w_c.a.shape:
                raise ValueError(
                    f"{op}: {name} is {list(part.shape)}, expected [{v}, r] and both alike"
                )
        return
    if isinstance(w_c, (int, float)):
        return
    if not isinstance(w_c, Tensor) or w_c.layout != torch.strided:
        raise TypeError(
            f"{op}: w_c must be a dense tensor, a LowRank or a number, got {describe(w_c)}"
        )
    check_floats(op, "w_c", w_c, device)
    if w_c.ndim != 0 and list(w_c.shape) != [v, v]:
        raise ValueError(f"{op}: w_c is {list(w_c.shape)}, but unary has v = {v}")


def check_floats(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises unless `tensor` is a float32, bfloat16 or float16 tensor on `device`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {describe(tensor)}")
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        came = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {name} must be float32, bfloat16 or float16, got {came}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device} but unary is on {device}")


def check_labels_known(known: Tensor | None, v: int) -> None:
    if known is not None and not known.is_cuda and known.numel() and int(known.max()) >= v:
        raise ValueError(
            f"mrf_mean_field: known holds label {int(known.max())}, expected less than {v}"
        )


def check_unknown(known: Tensor | None, unknown: int | None) -> None:
    """Raises ValueError if more positions of a picture on a CPU are unknown than `unknown`."""
    if known is None or unknown is None or known.is_cuda or known.numel() == 0:
        return
    most = int((known < 0).sum(1).max())
    if most > unknown:
        raise ValueError(
            f"mrf_mean_field: unknown is {unknown}, but {most} positions of a picture are"
        )


def bad_unary(position: int) -> ValueError:
    return ValueError(
        f"mrf_mean_field: unary of position {position} has a NaN, an infinity, or nothing but -inf"
    )
