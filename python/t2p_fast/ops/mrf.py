# SPDX-License-Identifier: Apache-2.0
"""Markov random fields over a grid of tokens: mean field, as MarkovGen's layer, and other solvers.

Sizes: `b` pictures, `n` positions, `v` labels, `e` edges.
"""

from typing import Any

import torch
from torch import Tensor

from t2p_fast._checks import check_choice, describe, under_autocast
from t2p_fast._library import _C, define_op
from t2p_fast.memory import empty, empty_like
from t2p_fast.ops.mrf_autograd import mean_field_backward, mean_field_setup_context
from t2p_fast.ops.mrf_gathered import Gathered
from t2p_fast.ops.mrf_graph import (
    Edges,
    GridWeights,
    LabelWeights,
    LowRank,
    PairWeights,
    bad_unary,
    check_floats,
    check_labels,
    check_labels_known,
    check_pairs,
    check_unknown,
    csr_edges,
    dense_edges,
    dense_grid,
    edge_starts,
    grid_edges,
    window_edges,
)
from t2p_fast.ops.mrf_low_rank import LowRankField
from t2p_fast.ops.mrf_pictures import Pictures
from t2p_fast.ops.mrf_rounds import settle
from t2p_fast.ops.mrf_tensor_cores import LabelStep
from t2p_fast.ops.mrf_window import plain_window_mean_field, window_mean_field

__all__ = ["mrf_energy", "mrf_likeliest", "mrf_mean_field", "mrf_pack"]


# Mean field: the kernels, for CPU and CUDA tensors, beside their fake -----------------------------


# Elsewhere products of bfloat16 on a CPU take several times as long as those of float32.
_HAS_BFLOAT16: bool = getattr(
    torch.cpu,
    "_is_avx512_bf16_supported",
    lambda: _C.build_info()["isa"] in ("avx512_bf16", "amx"),
)()


def _mean_field(
    unary: Tensor,
    w_s: Tensor,
    begin: Tensor | None,
    node: Tensor | None,
    height: int,
    width: int,
    w_c: Tensor,
    w_b: Tensor | None,
    known: Tensor | None,
    iterations: int,
    damping: float,
    temperature: float,
    candidates: int,
    packed: Tensor | None = None,
    unknown: int | None = None,
) -> Tensor:
    check_unknown(known, unknown)
    if w_b is not None and LowRankField.fits(unary, w_c, damping):
        check_labels_known(known, unary.shape[2])
        pairs = _local_or_dense(w_s.float(), begin, node, height, width, unary.shape[1])
        return LowRankField(unary, *pairs, w_c, w_b, known, temperature).mean_field(iterations)
    potts, scale = w_c.ndim == 0, 1.0
    if potts and unary.is_cuda:  # the number stays there, with the weights of pairs
        w_s = w_s.float() * w_c.float()
    elif potts:
        scale = float(w_c)
    if potts and height and damping == 0 and not unary.is_cuda and unary.numel():
        grid = GridWeights(w_s, height, width)
        by_window = window_mean_field(unary, grid, scale, known, iterations, temperature)
        if by_window is not None:
            return by_window
    threads = torch.get_num_threads()
    pictures: Pictures | Gathered
    if unary.is_cuda and known is not None:
        pictures = Gathered(unary, known, unknown)
    else:
        pictures = Pictures(unary, known)
    v, scores = pictures.v, pictures.unary
    low = w_c.dtype == torch.bfloat16 and w_c.ndim == 2 and not candidates
    if not scores.is_cuda and not _HAS_BFLOAT16:
        low = False
        if packed is not None:
            w_c, packed = _unpacked(packed, v), None
    dtype = torch.bfloat16 if low else torch.float32
    w_c, w_b = w_c.to(dtype), None if w_b is None else w_b.to(dtype)
    edges, matrix = _local_or_dense(w_s, begin, node, height, width, pictures.n)
    matrix = None if matrix is None else matrix.to(dtype)
    if matrix is not None:
        pictures.listen(matrix)
    transposed = w_c.t().contiguous() if candidates else None

    q, fresh, message, mixed = (empty(scores.shape, scores, dtype) for _ in range(4))
    result = empty_like(scores) if low else None
    by_hand = low and w_b is None and packed is not None and not scores.is_cuda
    if by_hand:
        message = empty_like(scores)
    fused = LabelStep(scores, w_c) if low and w_b is None and scores.is_cuda else None
    bad = _C.mrf_update(None, scores, None, 1.0, 0.0, temperature, q, threads)
    if bad >= 0:
        raise bad_unary(int(pictures.row[bad]) % pictures.n)
    for step in range(iterations):
        to = result if result is not None and step + 1 == iterations else fresh
        previous = q if damping != 0 else None
        if edges is not None and potts and not scores.is_cuda:
            _C.mrf_local_step(
                *edges, pictures.slot, pictures.row, q, scores, scale, damping, temperature, to,
                threads,
            )  # fmt: skip
        else:
            if edges is not None:
                _C.mrf_message(*edges, pictures.slot, pictures.row, q, mixed, threads)
            elif matrix is not None:
                pictures.mix(q, mixed, threads)
            said: Tensor | None = None
            if potts:
                said = mixed
            elif fused is not None and fused.fits:
                fused(mixed, previous, damping, temperature, to)
            elif w_b is not None:
                said = torch.mm(mixed @ w_b, w_c.T, out=message)
            elif transposed is not None:
                said = _truncated_labels(mixed, transposed, candidates)
            elif by_hand and packed is not None:
                _C.mrf_label_product(mixed, packed, message, threads)
                said = message
            else:
                said = torch.mm(mixed, w_c.T, out=message)
            if said is not None:
                _C.mrf_update(said, scores, previous, scale, damping, temperature, to, threads)
        q, fresh = to, q
    return pictures.fill(q.view(-1, v)).to(unary.dtype)


def _unpacked(packed: Tensor, v: int) -> Tensor:
    """What `mrf_pack` made where there are no products of bfloat16."""
    if packed.numel() != 4 * v * v:
        raise ValueError(
            f"mrf_mean_field: packed must have {4 * v * v} bytes for {v} labels, got "
            f"{packed.numel()}"
        )
    return packed.view(torch.float32).view(v, v)


def _truncated_labels(mixed: Tensor, transposed: Tensor, candidates: int) -> Tensor:
    """The label step from the `candidates` largest entries of every row alone."""
    weight, label = mixed.topk(min(candidates, mixed.shape[1]), sorted=False)
    return torch.nn.functional.embedding_bag(
        label, transposed, mode="sum", per_sample_weights=weight
    )


def _local_or_dense(
    w_s: Tensor, begin: Tensor | None, node: Tensor | None, height: int, width: int, n: int
) -> tuple[Edges | None, Tensor | None]:
    """Edges where there are few of them, else the matrix."""
    if begin is not None and node is not None:
        return csr_edges(begin, node, w_s, self_edges=True), None
    if height == 0:
        return None, w_s
    # An edge costs about four times what an entry of a matrix product does.
    if w_s.is_cuda:  # to count would mean to wait
        if w_s.numel() * 4 < n:
            return window_edges(w_s, height, width), None
    elif int(w_s.count_nonzero()) * 4 < n:
        return grid_edges(w_s, height, width), None
    return None, dense_grid(w_s, height, width)


def _likeliest(
    unary: Tensor, w_s: Tensor, begin: Tensor | None, node: Tensor | None, height: int, width: int,
    w_c: Tensor, w_b: Tensor | None, known: Tensor | None, iterations: int, damping: float,
    temperature: float, candidates: int, packed: Tensor | None = None, unknown: int | None = None,
    rounds: int = 1,
) -> Tensor:  # fmt: skip
    pairs = w_s, begin, node, height, width
    if w_b is not None and LowRankField.fits(unary, w_c, damping):
        check_unknown(known, unknown)
        check_labels_known(known, unary.shape[2])
        edges = _local_or_dense(w_s.float(), *pairs[1:], unary.shape[1])
        field = LowRankField(unary, *edges, w_c, w_b, known, temperature)
        return field.likeliest(iterations, rounds)

    def infer(unary: Tensor, known: Tensor | None) -> Tensor:
        return _mean_field(
            unary, *pairs, w_c, w_b, known, iterations, damping, temperature, candidates, packed,
            unknown,
        )  # fmt: skip

    known = known if rounds == 1 else settle(infer, unary, known, rounds)
    return infer(unary, known).argmax(-1)


def _likeliest_fake(unary: Tensor, *_: object) -> Tensor:
    return unary.new_empty(unary.shape[:2], dtype=torch.int64)


def _mean_field_fake(unary: Tensor, *_: object) -> Tensor:
    return torch.empty_like(unary, memory_format=torch.contiguous_format)


_ARGUMENTS = (
    "(Tensor unary, Tensor w_s, Tensor? begin, Tensor? node, int height, int width, "
    "Tensor w_c, Tensor? w_b, Tensor? known, int iterations, float damping, float temperature, "
    "int candidates, Tensor? packed=None, int? unknown=None"
)
_mrf_likeliest = define_op(
    "mrf_likeliest" + _ARGUMENTS + ", int rounds=1) -> Tensor",
    cpu=_likeliest,
    fake=_likeliest_fake,
)
_mrf_mean_field = define_op(
    "mrf_mean_field" + _ARGUMENTS + ") -> Tensor",
    cpu=_mean_field,
    fake=_mean_field_fake,
    setup_context=mean_field_setup_context,
    backward=mean_field_backward,
)


# Public functions --------------------------------------------------------------------------------


def mrf_mean_field(
    unary: Tensor,
    w_s: PairWeights,
    w_c: LabelWeights,
    *,
    iterations: int = 5,
    known: Tensor | None = None,
    damping: float = 0.0,
    temperature: float = 1.0,
    candidates: int | None = None,
    packed: Tensor | None = None,
    unknown: int | None = None,
) -> Tensor:
    """Parallel mean field in a Markov random field over tokens: MarkovGen's algorithm 1.

    ``q = softmax(unary)``, then `iterations` times ``q = softmax(W_s q W_c^T + unary)``: the
    mean field of the energy of `mrf_energy`. Known positions keep their label: what one says to
    the others is a single number for that label, and only the others iterate, exactly as if all
    did.

    Args:
        unary: ``[b, n, v]`` scores, such as a transformer's logits; higher is better. float32,
            bfloat16 or float16. -inf rules a label out.
        w_s: weights of pairs of positions: a matrix ``[n, n]``, a `GridWeights` table (all
            offsets, a window, or `grid_neighbours`), or a sparse CSR matrix ``[n, n]``.
        w_c: weights of pairs of labels: a matrix ``[v, v]``, a `LowRank` pair, or a number (or
            tensor ``[]``) for Potts, the weight of two labels that are equal. In bfloat16 products
            are formed in bfloat16, which is several times as fast; else in float32.
        iterations: at least 1.
        known: ``[b, n]`` int64, the label of a known position, negative where it is to be found.
        damping: share of the previous ``q`` in the next, in [0, 1). The paper has none.
        temperature: of every softmax.
        candidates: if given, labels speak through the `candidates` largest entries of a row of
            ``W_s q`` alone, an approximation for large `v`. It has no gradient.
        packed: what `mrf_pack` made of this very `w_c`: faster the fewer positions are unknown, and
            without AMX with seven eighths of the multiplications where it says so.
        unknown: how many positions of a picture are to be found, at most: with it, no call on CUDA
            waits for the GPU. Where some are known, a host that is not told asks the GPU, once a
            call; and while a CUDA graph is captured, all positions iterate, so that it can be
            replayed for any number.

    Returns:
        ``q``, ``[b, n, v]`` probabilities in the dtype of `unary`; one-hot where known.
        Differentiable in `unary`, `w_s` and `w_c`; the gradient computes the iterations again
        rather than keep them.

    Raises:
        ValueError: shapes, numbers or known labels do not fit; on the CPU also if more positions
            are to be found than `unknown`, or one's unary scores hold a NaN or +inf, or nothing
            but -inf. On CUDA these give NaN.
        TypeError: dtypes do not fit.

    Complexity:
        ``O(iterations u (u v + v^2))`` for ``u`` unknown positions and dense weights, on CUDA those
        of the picture that has most;
        ``O(iterations u v)`` times the neighbours for Potts.
    """
    options = damping, temperature, candidates, packed, unknown
    given = unary, w_s, w_c, iterations, known, *options
    _check("mrf_mean_field", *given)
    if unknown is None:
        by_window = plain_window_mean_field(
            unary, w_s, w_c, known, iterations, damping, temperature
        )
        if by_window is not None:
            return by_window
    arguments = _arguments(*given)
    q: Tensor = _mrf_mean_field(*arguments)
    return q


@torch.no_grad()
def mrf_likeliest(
    unary: Tensor,
    w_s: PairWeights,
    w_c: LabelWeights,
    *,
    iterations: int = 5,
    known: Tensor | None = None,
    damping: float = 0.0,
    temperature: float = 1.0,
    candidates: int | None = None,
    packed: Tensor | None = None,
    unknown: int | None = None,
    rounds: int = 1,
) -> Tensor:
    """The likeliest labels of `mrf_mean_field`, of equals the first: MarkovGen's last line.

    ``q.argmax(-1)``, and sooner for label weights of low rank on a CPU, where ``q`` is never made.

    Args:
        rounds: inferences. One finds every label as it is likeliest by itself; of two that exclude
            each other it may take both or neither. After each but the last an equal share of the
            labels of a picture about which there was a choice, the surest, of equally sure ones the
            first, become known (as in MaskGIT's decoding, H. Chang et al., CVPR 2022, with a field
            in place of the transformer).
        The others as those of `mrf_mean_field`.

    Returns:
        ``[b, n]`` int64, the label of known positions among them. Not differentiable.

    Raises:
        As `mrf_mean_field`.
    """
    options = damping, temperature, candidates, packed, unknown
    given = unary, w_s, w_c, iterations, known, *options
    _check("mrf_likeliest", *given)
    if rounds < 1:
        raise ValueError(f"mrf_likeliest: rounds is {rounds}, expected at least 1")
    arguments = _arguments(*given)
    labels: Tensor = _mrf_likeliest(*arguments, rounds)
    return labels


def _check(
    op: str, unary: Tensor, w_s: PairWeights, w_c: LabelWeights, iterations: int,
    known: Tensor | None, damping: float, temperature: float, candidates: int | None,
    packed: Tensor | None, unknown: int | None,
) -> None:  # fmt: skip
    check_unary(op, unary)
    check_pairs(op, w_s, unary.shape[1], unary.device)
    check_labels(op, w_c, unary.shape[2], unary.device)
    if iterations < 1:
        raise ValueError(f"{op}: iterations is {iterations}, expected at least 1")
    if not 0 <= damping < 1:
        raise ValueError(f"{op}: damping is {damping}, expected 0 to less than 1")
    if not 1e-6 <= temperature <= 1e6:
        raise ValueError(f"{op}: temperature is {temperature}, expected 1e-06 to 1e+06")
    if candidates is not None and (candidates < 1 or not _is_matrix(w_c)):
        raise ValueError(
            f"{op}: candidates is {candidates}, expected at least 1 and a matrix w_c, or None"
        )
    _check_known(op, known, unary)
    if unknown is not None and (unknown < 0 or known is None):
        raise ValueError(
            f"{op}: unknown is {unknown}, expected at least 0 and known positions, or None"
        )
    if packed is not None and (packed.dtype != torch.uint8 or not _is_matrix(w_c)):
        raise ValueError(
            f"{op}: packed must be what mrf_pack returned for a matrix w_c, got "
            f"{list(packed.shape)} of {packed.dtype}"
        )


def _arguments(
    unary: Tensor, w_s: PairWeights, w_c: LabelWeights, iterations: int, known: Tensor | None,
    damping: float, temperature: float, candidates: int | None, packed: Tensor | None,
    unknown: int | None,
) -> tuple[Any, ...]:  # fmt: skip
    """Those of the registered ops."""
    values, begin, node, height, width = unpack_pairs(w_s)
    first, second = unpack_labels(w_c, unary)
    unary, values = under_autocast(unary, values)
    return (
        unary, values, begin, node, height, width, first, second, known, iterations,
        float(damping), float(temperature), candidates or 0,
        packed if packed is not None and packed.numel() > 0 else None, unknown,
    )  # fmt: skip


@torch.no_grad()
def mrf_pack(w_c: Tensor) -> Tensor:
    """Label weights in the form that products on a CPU want, for `mrf_mean_field(packed=...)`.

    It takes as long as multiplying 50 rows (1024 labels) to 140 (8192); who infers often with the
    same weights does it once. A processor with AVX512-BF16 or AMX has a product for them; others
    multiply float32 several times as fast as bfloat16, and there this is the weights in float32.

    Without AMX, if `v` is a multiple of 1024, then from 32 unknown positions on the product is made
    by halves: seven products of quarters and of their sums instead of eight (Strassen 1969). The
    sums are rounded to bfloat16 as the weights are, after rows and labels were scaled by powers of
    two (Ballard et al. 2016, section 5); messages are then off by about half as much again as
    without.

    Args:
        w_c: ``[v, v]`` bfloat16, on the CPU. If it changes, pack it again.

    Returns:
        uint8, ``2 v^2`` bytes and a little, by halves ``4.5 v^2``, without AVX512-BF16 ``4 v^2``;
        with it empty, and of no consequence, where padding would cost more than is gained, as for
        less than some 500 labels. It is not meant to be stored.

    Raises:
        ValueError: `w_c` is no square matrix, or on a GPU.
        TypeError: `w_c` is not bfloat16.
    """
    if not isinstance(w_c, Tensor) or w_c.layout != torch.strided:
        raise TypeError(f"mrf_pack: w_c must be a dense tensor, got {describe(w_c)}")
    if w_c.dtype != torch.bfloat16:
        came = str(w_c.dtype).removeprefix("torch.")
        raise TypeError(f"mrf_pack: w_c must be bfloat16, got {came}")
    if w_c.ndim != 2 or w_c.shape[0] != w_c.shape[1] or w_c.shape[0] == 0:
        raise ValueError(f"mrf_pack: w_c must be [v, v] with v >= 1, got {list(w_c.shape)}")
    if w_c.device.type != "cpu":
        raise ValueError(f"mrf_pack: w_c must be on the CPU, got {w_c.device}")
    if not _HAS_BFLOAT16:
        return w_c.float().contiguous().view(torch.uint8).flatten()
    size = (_C.mrf_packed_size(w_c.shape[0]),)
    packed = empty(size, w_c, torch.float32).view(torch.uint8)
    if packed.numel():
        _C.mrf_pack(w_c.detach().contiguous(), packed, torch.get_num_threads())
    return packed


def mrf_energy(
    unary: Tensor,
    w_s: PairWeights,
    w_c: LabelWeights,
    labels: Tensor,
    *,
    pair_sum: str = "unordered",
) -> Tensor:
    """The energy of labels; lower is better, and ``p(x)`` is in proportion to ``exp(-E(x))``.

    ``E(x) = -sum_i f_i(x_i) - sum_{i < j} (W_s[i, j] W_c[x_i, x_j] + W_s[j, i] W_c[x_j, x_i]) / 2``

    This is the energy whose mean field `mrf_mean_field` computes, where weights are symmetric and
    ``W_s`` has a zero diagonal. MarkovGen's equation 2 sums all ordered pairs, ``i = j`` among
    them: that is `pair_sum` ``"ordered"``.

    Args:
        unary: ``[b, n, v]`` scores ``f``.
        w_s: as in `mrf_mean_field`.
        w_c: as in `mrf_mean_field`.
        labels: ``[b, n]`` int64.
        pair_sum: ``"unordered"`` or ``"ordered"``.

    Returns:
        ``[b]``, in float32 or what `unary` and the weights promote to; differentiable.
    """
    op = "mrf_energy"
    check_unary(op, unary)
    n, v = unary.shape[1:]
    check_pairs(op, w_s, n, unary.device)
    check_labels(op, w_c, v, unary.device)
    check_choice(op, "pair_sum", pair_sum, ("unordered", "ordered"))
    check_label_tensor(op, "labels", labels, unary)
    values, begin, node, height, width = unpack_pairs(w_s)
    if begin is None or node is None:
        matrix = values if height == 0 else dense_grid(values, height, width)
        here = torch.arange(n, device=unary.device)
        start, node, weight = here.repeat_interleave(n), here.repeat(n), matrix.flatten()
    else:
        start, weight = edge_starts(begin), values
    if pair_sum == "unordered":
        weight = torch.where(start == node, 0, weight) / 2
    x, y = labels[:, start], labels[:, node]
    first, second = unpack_labels(w_c, unary)
    if second is not None:
        pairs = (first[x] * second[y]).sum(-1)
    elif first.ndim == 0:
        pairs = first * (x == y)
    else:
        pairs = first[x, y]
    chosen = unary.gather(-1, labels[..., None])[..., 0]
    energy: Tensor = -chosen.float().sum(-1) - (pairs * weight).float().sum(-1)
    return energy


def unpack_pairs(w_s: PairWeights) -> tuple[Tensor, Tensor | None, Tensor | None, int, int]:
    """Values, CSR structure or None, and the grid's size or zeros."""
    if isinstance(w_s, GridWeights):
        return w_s.table, None, None, w_s.height, w_s.width
    if w_s.layout == torch.sparse_csr:
        return w_s.values(), w_s.crow_indices().long(), w_s.col_indices().long(), 0, 0
    return w_s, None, None, 0, 0


def unpack_labels(w_c: LabelWeights, like: Tensor) -> tuple[Tensor, Tensor | None]:
    if isinstance(w_c, LowRank):
        return w_c.a, w_c.b
    if isinstance(w_c, Tensor):
        return w_c, None
    return torch.full((), float(w_c), dtype=torch.float32, device=like.device), None


def solver_edges(w_s: PairWeights) -> Edges:
    """The edges between different positions."""
    values, begin, node, height, width = unpack_pairs(w_s)
    if begin is not None and node is not None:
        return csr_edges(begin, node, values, self_edges=False)
    if height == 0:
        return dense_edges(values)
    return grid_edges(values, height, width, self_edges=False)


def _is_matrix(w_c: LabelWeights) -> bool:
    return isinstance(w_c, Tensor) and w_c.ndim == 2


def check_unary(op: str, unary: Tensor) -> None:
    if not isinstance(unary, Tensor) or unary.layout != torch.strided:
        raise TypeError(f"{op}: unary must be a dense tensor, got {describe(unary)}")
    check_floats(op, "unary", unary, unary.device)
    if unary.ndim != 3 or unary.shape[2] == 0:
        raise ValueError(f"{op}: unary must be [b, n, v >= 1], got {list(unary.shape)}")


def _check_known(op: str, known: Tensor | None, unary: Tensor) -> None:
    if known is not None:
        check_label_tensor(op, "known", known, unary)


def check_label_tensor(op: str, name: str, labels: Tensor, unary: Tensor) -> None:
    """Raises unless `labels` is an int64 tensor ``[b, n]`` beside `unary`."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        came = str(labels.dtype) if isinstance(labels, Tensor) else describe(labels)
        raise TypeError(f"{op}: {name} must be int64, got {came.removeprefix('torch.')}")
    if labels.shape != unary.shape[:2]:
        raise ValueError(f"{op}: {name} is {list(labels.shape)}, expected {list(unary.shape[:2])}")
    if labels.device != unary.device:
        raise ValueError(f"{op}: {name} is on {labels.device} but unary is on {unary.device}")
