# SPDX-License-Identifier: Apache-2.0
"""Alpha-expansion: labels of low energy by graph cuts, on the maximum flow of scipy."""

from typing import Any

import torch
from torch import Tensor

from t2p_fast.ops.mrf import check_label_tensor
from t2p_fast.ops.mrf_graph import LabelWeights, PairWeights, edge_starts, reverse_edges
from t2p_fast.ops.mrf_solvers import solver_problem

__all__ = ["mrf_alpha_expansion"]

# scipy's capacities, and its total flow, are 32-bit integers.
_TOTAL_CAPACITY = 2**30


def mrf_alpha_expansion(
    unary: Tensor,
    w_s: PairWeights,
    w_c: LabelWeights,
    *,
    init: Tensor | None = None,
    known: Tensor | None = None,
    cycles: int = 10,
) -> Tensor:
    """Alpha-expansion (Boykov, Veksler and Zabih, PAMI 2001): a local minimum of `mrf_energy`.

    In turn for every label, all positions at once choose between their present label and that
    one, the best such choice being a minimum cut (Kolmogorov and Zabih, PAMI 2004); until a cycle
    over the labels changes nothing. The energy never rises, and ends within twice the ratio of the
    largest to the smallest pair cost of the least. CPU only; needs scipy (``t2p-fast[cuts]``).

    Args:
        unary: ``[b, n, v]`` scores, finite or -inf.
        w_s: as in `mrf_mean_field`, symmetric and not negative; its diagonal plays no part.
        w_c: as in `mrf_mean_field`, symmetric, and ``-w_c`` a metric up to a constant:
            ``w_c[a, a] + w_c[b, c] >= w_c[a, c] + w_c[b, a]``. Potts weights that are not negative
            and `codebook_labels` are; a learned matrix hardly ever is.
        init: ``[b, n]`` int64 labels to start from; the likeliest by `unary` if not given, and
            where one is ruled out by -inf.
        known: ``[b, n]`` int64, the label of a known position, negative where it is to be found.
        cycles: at most so many.

    Returns:
        Labels, ``[b, n]`` int64.

    Raises:
        ImportError: scipy is not installed.
        ValueError: weights are negative or not a metric, or what the other solvers refuse.

    Complexity:
        ``O(v^3)`` for the check of the metric, and ``b v`` maximum flows over ``n`` nodes a cycle.
    """
    op = "mrf_alpha_expansion"
    try:
        import scipy.sparse.csgraph  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{op}: needs scipy: pip install 't2p-fast[cuts]'") from error
    if cycles < 1:
        raise ValueError(f"{op}: cycles is {cycles}, expected at least 1")
    unary, edges, labels = solver_problem(op, unary, w_s, w_c, cuda=False)
    reverse_edges(op, edges)
    for name, tensor in (("init", init), ("known", known)):
        if tensor is not None:
            check_label_tensor(op, name, tensor, unary)
            low = 0 if name == "init" else -(2**63)
            if (
                tensor.numel()
                and not low <= int(tensor.min()) <= int(tensor.max()) < labels.shape[0]
            ):
                raise ValueError(f"{op}: {name} holds a label outside [0, {labels.shape[0]})")
    if len(edges.weight) and float(edges.weight.min()) < 0:
        raise ValueError(f"{op}: w_s holds {float(edges.weight.min()):g}, expected none below 0")
    _check_metric(op, labels)
    start = edge_starts(edges.begin)
    once = start < edges.node  # every pair of positions once
    pairs = start[once], edges.node[once], edges.weight[once].double()
    results = []
    for picture in range(unary.shape[0]):
        scores = unary[picture].double()
        x = scores.argmax(-1)
        if init is not None:
            possible = scores.gather(1, init[picture][:, None])[:, 0] > -torch.inf
            x = torch.where(possible, init[picture], x)
        fixed = torch.zeros_like(x, dtype=torch.bool)
        if known is not None:
            fixed = known[picture] >= 0
            x = torch.where(fixed, known[picture], x)
            scores = scores.masked_fill(fixed[:, None], 0.0)  # which may rule known labels out
        results.append(_expand(scores, pairs, labels.double(), x, fixed, cycles))
    return torch.stack(results) if results else unary.new_empty(unary.shape[:2], dtype=torch.int64)


def _check_metric(op: str, w_c: Tensor) -> None:
    tolerance = 1e-5 * float(w_c.abs().max())
    for a in range(w_c.shape[0]):
        slack = w_c[a, a] + w_c - w_c[:, a, None] - w_c[None, a]
        if float(slack.min()) < -tolerance:
            b, c = divmod(int(slack.argmin()), w_c.shape[0])
            raise ValueError(
                f"{op}: -w_c is no metric: w_c[{a}, {a}] + w_c[{b}, {c}] < w_c[{a}, {c}] + "
                f"w_c[{b}, {a}]; mrf_bp and mrf_icm take any symmetric weights"
            )


def _expand(
    unary: Tensor,
    pairs: tuple[Tensor, Tensor, Tensor],
    w_c: Tensor,
    x: Tensor,
    fixed: Tensor,
    cycles: int,
) -> Tensor:
    i, j, weight = pairs
    everywhere = torch.arange(len(x), device=x.device)

    def energy(labels: Tensor) -> float:
        chosen = unary[everywhere, labels].sum()
        return -float(chosen + (weight * w_c[labels[i], labels[j]]).sum())

    best, unchanged = energy(x), 0
    for move in range(cycles * w_c.shape[0]):
        alpha = move % w_c.shape[0]
        chosen = torch.where(_cut(unary, pairs, w_c, x, fixed, alpha), alpha, x)
        reached = energy(chosen)
        # Capacities are rounded: what counts is the energy itself.
        unchanged = 0 if reached < best else unchanged + 1
        if reached < best:
            x, best = chosen, reached
        if unchanged == w_c.shape[0]:
            break
    return x


def _cut(
    unary: Tensor,
    pairs: tuple[Tensor, Tensor, Tensor],
    w_c: Tensor,
    x: Tensor,
    fixed: Tensor,
    alpha: int,
) -> Tensor:
    """Who takes label `alpha`, ``[n]`` bool: the sink's side of a minimum cut.

    A pair's cost is A, B, C or D as neither, j, i or both take it, which is
    ``A + (C - A) y_i + (D - C) y_j + (B + C - A - D) (1 - y_i) y_j`` for ``y`` in {0, 1}.
    """
    i, j, weight = pairs
    a, b = -weight * w_c[x[i], x[j]], -weight * w_c[x[i], alpha]
    c, d = -weight * w_c[alpha, x[j]], -weight * w_c[alpha, alpha]
    between = (b + c - a - d).clamp_min(0)
    cost = unary.gather(1, x[:, None])[:, 0] - unary[:, alpha]
    forced = fixed | ~cost.isfinite()
    cost = torch.where(forced, 0, cost).index_add(0, i, c - a).index_add(0, j, d - c)
    # More than all that could be gained by moving where that is not allowed.
    around = torch.zeros_like(cost).index_add(0, i, between).index_add(0, j, between)
    cost = torch.where(forced, cost.abs() + around + 1, cost)
    return _minimum_cut(i, j, between, cost)


def _minimum_cut(i: Tensor, j: Tensor, between: Tensor, cost: Tensor) -> Tensor:
    """The sink's side of the cut that separates by least ``sum cost y + between (1 - y_i) y_j``."""
    from scipy.sparse import coo_array, csr_array
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    n = len(cost)
    source, sink = n, n + 1
    out = (cost > 0).nonzero()[:, 0]
    into = (cost < 0).nonzero()[:, 0]
    if len(into) == 0:
        return torch.zeros_like(cost, dtype=torch.bool)
    tails = torch.cat([i, out.new_full(out.shape, source), into])
    heads = torch.cat([j, out, into.new_full(into.shape, sink)])
    capacity = torch.cat([between, cost[out], -cost[into]])
    scale = _TOTAL_CAPACITY / float(capacity.sum().clamp_min(1e-300))
    integers = (capacity * scale).round().int()
    kept = integers > 0
    graph: Any = csr_array(
        coo_array(
            (integers[kept].numpy(), (tails[kept].numpy(), heads[kept].numpy())),
            shape=(n + 2, n + 2),
        )
    )
    left = graph - maximum_flow(graph, source, sink).flow
    left.data[left.data < 0] = 0
    left.eliminate_zeros()
    reached = breadth_first_order(left, source, return_predecessors=False)
    side = cost.new_ones(n + 2, dtype=torch.bool)
    side[torch.from_numpy(reached).long()] = False
    return side[:n]
