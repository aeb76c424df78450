# SPDX-License-Identifier: Apache-2.0
"""Labels of low energy in a Markov random field: iterated conditional modes, belief propagation."""

import torch
from torch import Tensor

from t2p_fast._checks import check_choice
from t2p_fast._library import _C, define_op
from t2p_fast.ops.mrf import check_label_tensor, check_unary, solver_edges, unpack_labels
from t2p_fast.ops.mrf_graph import (
    Edges,
    GridWeights,
    LabelWeights,
    PairWeights,
    check_labels,
    check_pairs,
    reverse_edges,
)

__all__ = ["mrf_bp", "mrf_icm"]


# The kernels, for CPU and CUDA tensors, each beside its fake --------------------------------------


def _icm(
    unary: Tensor,
    begin: Tensor,
    node: Tensor,
    weight: Tensor,
    w_c: Tensor,
    known: Tensor,
    init: Tensor,
    sweeps: int,
) -> Tensor:
    labels = init.clone()
    _check_range("mrf_icm", "init", init, unary.shape[2])
    _check_range("mrf_icm", "known", known, unary.shape[2])
    labels = torch.where(known >= 0, known, labels).contiguous()
    _C.mrf_icm(
        begin, node, weight, unary.contiguous(), w_c.contiguous(), known.contiguous(), sweeps,
        labels, torch.get_num_threads(),
    )  # fmt: skip
    return labels


def _icm_fake(unary: Tensor, *arguments: Tensor | int) -> Tensor:  # noqa: ARG001
    init = arguments[5]
    assert isinstance(init, Tensor)
    return torch.empty_like(init, memory_format=torch.contiguous_format)


def _bp(
    unary: Tensor,
    begin: Tensor,
    node: Tensor,
    weight: Tensor,
    reverse: Tensor,
    order: Tensor,
    counts: list[int],
    w_c: Tensor,
    iterations: int,
    damping: float,
    temperature: float,
) -> Tensor:
    b, _, v = unary.shape
    threads = torch.get_num_threads()
    unary, w_c = unary.contiguous(), w_c.contiguous()
    messages = unary.new_zeros(b, node.shape[0], v)
    other = torch.empty_like(messages) if len(counts) == 1 else messages
    parts = order.split(counts)
    factors, factor_of = (None, None) if unary.is_cuda else _factors(weight, w_c, temperature)
    for _ in range(iterations):
        for part in parts:
            _C.mrf_belief_step(
                begin, node, weight, reverse, part, unary, w_c, factors, factor_of, damping,
                temperature, messages, other, threads,
            )  # fmt: skip
        messages, other = other, messages
    beliefs = torch.empty_like(unary)
    _C.mrf_beliefs(begin, node, weight, reverse, unary, w_c, messages, beliefs, threads)
    return beliefs


def _factors(
    weight: Tensor, w_c: Tensor, temperature: float
) -> tuple[Tensor | None, Tensor | None]:
    """``exp(weight w_c / temperature)`` for every weight, and which of them an edge has.

    None where that is of no use: for max-product, for many weights, or where float32 could not
    hold the sums of such factors.
    """
    if temperature == 0 or len(weight) == 0:
        return None, None
    weights, factor_of = weight.unique(return_inverse=True)
    exponents = weights[:, None, None] * w_c / temperature if len(weights) <= 16 else None
    if exponents is None or float(exponents.abs().max()) > 40:
        return None, None
    return exponents.exp(), factor_of


def _bp_fake(unary: Tensor, *_: object) -> Tensor:
    return torch.empty_like(unary, memory_format=torch.contiguous_format)


def _check_range(op: str, name: str, labels: Tensor, v: int) -> None:
    if labels.numel() and (int(labels.max()) >= v or (name == "init" and int(labels.min()) < 0)):
        raise ValueError(
            f"{op}: {name} holds labels {int(labels.min())} to {int(labels.max())}, expected less "
            f"than {v}" + (" and none below 0" if name == "init" else "")
        )


_mrf_icm = define_op(
    "mrf_icm(Tensor unary, Tensor begin, Tensor node, Tensor weight, Tensor w_c, Tensor known, "
    "Tensor init, int sweeps) -> Tensor",
    cpu=_icm,
    fake=_icm_fake,
)
_mrf_bp = define_op(
    "mrf_bp(Tensor unary, Tensor begin, Tensor node, Tensor weight, Tensor reverse, Tensor order, "
    "int[] counts, Tensor w_c, int iterations, float damping, float temperature) -> Tensor",
    cpu=_bp,
    fake=_bp_fake,
)


# Public functions --------------------------------------------------------------------------------


def mrf_icm(
    unary: Tensor,
    w_s: PairWeights,
    w_c: LabelWeights,
    *,
    init: Tensor | None = None,
    known: Tensor | None = None,
    sweeps: int = 50,
) -> Tensor:
    """Iterated conditional modes (Besag, 1986): greedy descent of `mrf_energy`.

    Each position in turn takes the label that is best beside its neighbours' present ones, until a
    sweep changes nothing. The best is found by float32 sums, of equal ones the first, and has to
    beat the present label by float64 sums, so that the energy never rises.

    Args:
        unary: ``[b, n, v]`` scores, finite or -inf.
        w_s: as in `mrf_mean_field`, symmetric; its diagonal plays no part.
        w_c: as in `mrf_mean_field`, symmetric.
        init: ``[b, n]`` int64 labels to start from; the likeliest by `unary` if not given.
        known: ``[b, n]`` int64, the label of a known position, negative where it is to be found.
        sweeps: at most so many.

    Returns:
        Labels, ``[b, n]`` int64.

    Complexity:
        ``O(b e v)`` a sweep.
    """
    op = "mrf_icm"
    if sweeps < 1:
        raise ValueError(f"{op}: sweeps is {sweeps}, expected at least 1")
    unary, edges, labels = solver_problem(op, unary, w_s, w_c)
    reverse_edges(op, edges)
    for name, tensor in (("init", init), ("known", known)):
        if tensor is not None:
            check_label_tensor(op, name, tensor, unary)
    start = unary.argmax(-1) if init is None else init
    fixed = torch.full_like(start, -1) if known is None else known
    return _mrf_icm(unary, *edges, labels, fixed, start, sweeps)  # type: ignore[no-any-return]


def mrf_bp(
    unary: Tensor,
    w_s: PairWeights,
    w_c: LabelWeights,
    *,
    iterations: int = 50,
    damping: float = 0.5,
    temperature: float = 0.0,
    schedule: str = "parallel",
) -> Tensor:
    """Loopy belief propagation: max-product, sum-product, and what lies between.

    Exact on trees: at temperature 1 ``softmax(beliefs)`` are the marginals of ``exp(-E)``, at
    temperature 0 ``beliefs.argmax(-1)`` are the labels of least `mrf_energy`.

    Args:
        unary: ``[b, n, v]`` scores, finite or -inf.
        w_s: as in `mrf_mean_field`, symmetric; its diagonal plays no part.
        w_c: as in `mrf_mean_field`, symmetric. A message costs ``O(v^2)``.
        iterations: at least 1.
        damping: share of the previous message in the next, in [0, 1).
        temperature: 0 is max-product, 1 sum-product (as in PGMax).
        schedule: ``"parallel"`` sends all messages at once; ``"checkerboard"``, on grids, those
            of one colour of positions after the other, each from the newest messages.

    Returns:
        Beliefs, ``[b, n, v]`` float32: unary scores plus incoming messages.

    Raises:
        ValueError: shapes, numbers or symmetry do not fit. On CUDA, too, looking costs a wait.
        RuntimeError: on CUDA `v` is more than shared memory holds, some 8,000 at least.

    Complexity:
        ``O(b e v^2)`` an iteration; memory ``O(b e v)``.
    """
    op = "mrf_bp"
    if iterations < 1:
        raise ValueError(f"{op}: iterations is {iterations}, expected at least 1")
    if not 0 <= damping < 1:
        raise ValueError(f"{op}: damping is {damping}, expected 0 to less than 1")
    if not (temperature == 0 or 1e-6 <= temperature <= 1e6):
        raise ValueError(f"{op}: temperature is {temperature}, expected 0 or 1e-06 to 1e+06")
    check_choice(op, "schedule", schedule, ("parallel", "checkerboard"))
    unary, edges, labels = solver_problem(op, unary, w_s, w_c)
    reverse = reverse_edges(op, edges)
    order, counts = torch.arange(unary.shape[1], device=unary.device), [unary.shape[1]]
    if schedule == "checkerboard":
        if not isinstance(w_s, GridWeights):
            raise ValueError(f"{op}: schedule 'checkerboard' needs GridWeights as w_s")
        order, counts = _colours(w_s)
    return _mrf_bp(  # type: ignore[no-any-return]
        unary, *edges, reverse, order, counts, labels, iterations, float(damping),
        float(temperature),
    )  # fmt: skip


def solver_problem(
    op: str, unary: Tensor, w_s: PairWeights, w_c: LabelWeights, *, cuda: bool = True
) -> tuple[Tensor, Edges, Tensor]:
    """Checked, in float32, with the label weights as a matrix."""
    check_unary(op, unary)
    _, n, v = unary.shape
    check_pairs(op, w_s, n, unary.device)
    check_labels(op, w_c, v, unary.device)
    if unary.device.type == "cuda" and not cuda:
        raise ValueError(f"{op}: unary is on {unary.device}, this op runs on the CPU alone")
    first, second = unpack_labels(w_c, unary)
    if second is not None:
        labels = first.float() @ second.float().T
    elif first.ndim == 0:
        labels = first.float() * torch.eye(v, dtype=torch.float32, device=unary.device)
    else:
        labels = first.float()
    # Weights of low rank are symmetric up to rounding.
    rounding = 1e-5 * float(labels.abs().max()) if second is not None else 0.0
    if not bool(((labels - labels.T).abs() <= rounding).all()):
        raise ValueError(f"{op}: w_c must be symmetric and finite: pass (w_c + w_c.T) / 2")
    unary = unary.detach().float()
    best = unary.amax(-1)
    if not bool((best.isfinite() & ~unary.isnan().any(-1)).all()):
        raise ValueError(f"{op}: unary has a NaN, an infinity, or a position of nothing but -inf")
    edges = solver_edges(w_s)
    if not bool(edges.weight.isfinite().all()):
        raise ValueError(f"{op}: w_s has a NaN or an infinity")
    return unary, edges, ((labels + labels.T) / 2).detach()


def _colours(w_s: GridWeights) -> tuple[Tensor, list[int]]:
    """The positions, colour by colour, so that no two of a colour are neighbours."""
    table, height, width = w_s
    chosen = (table != 0).cpu().nonzero()
    chosen = chosen - chosen.new_tensor([table.shape[0] // 2, table.shape[1] // 2])
    chosen = chosen[chosen.abs().sum(1) > 0]
    y, x = (torch.arange(size, device=chosen.device) for size in (height, width))
    y, x = y[:, None], x[None]
    if len(chosen) == 0 or int(chosen.abs().sum(1).max()) == 1:
        colour = (y + x) % 2
    else:
        reach_y, reach_x = (int(c) + 1 for c in chosen.abs().amax(0))
        colour = y % reach_y * reach_x + x % reach_x
    colour = colour.flatten()
    return colour.argsort(stable=True).to(table.device), colour.bincount().tolist()
