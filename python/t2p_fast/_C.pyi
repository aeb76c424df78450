# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

LARGE: int

def init(torch: ModuleType) -> None: ...
def has_modes() -> bool: ...
def is_plain(*tensors: Tensor | None) -> bool: ...
def build_info() -> dict[str, Any]: ...
def empty(shape: Sequence[int], strides: Sequence[int], code: int, bits: int) -> object: ...
def kept_bytes() -> int: ...
def kept_limit() -> int: ...
def set_kept_limit(bytes: int) -> None: ...
def drop_blocks() -> None: ...
def normal_of_word(word: int) -> float: ...
def philox(
    seed: int, offset: int, index: int
) -> tuple[tuple[int, int, int, int], tuple[float, float, float, float]]: ...
def scheduler_workspace_size(batch: int, n: int, threshold: bool, rescale: bool) -> int: ...
def scheduler_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    index: Tensor | None,
    row: int,
    uncond_output: Tensor | None,
    guidance: float,
    rescale: float,
    bound: int,
    limit: float,
    ratio: float,
    learned: bool,
    shift: Tensor | None,
    history1: Tensor | None,
    history2: Tensor | None,
    noise: Tensor | None,
    draw: bool,
    seeds: Tensor | None,
    seed: int,
    offset: int,
    workspace: Tensor | None,
    prev: Tensor,
    x0: Tensor | None,
    threads: int,
) -> None: ...
def scheduler_plain_step(
    arguments: tuple[Any, ...],
    prev: Tensor | None,
    x0: Tensor | None,
    return_x0: bool,
    threads: int,
) -> tuple[Tensor, Tensor | None] | None: ...

class SchedulerPlan:
    def __init__(
        self,
        timesteps: Tensor | None,
        rows: list[int],
        coefficients: Tensor,
        bound: int,
        limit: float,
        ratio: float,
        learned: bool,
        noisy: int,
        quiet: int,
        returns_x0: bool,
    ) -> None: ...
    def step(
        self,
        sample: Tensor,
        model_output: Tensor,
        place: int | Tensor,
        uncond_output: Tensor | None,
        guidance: float,
        rescale: float,
        history1: Tensor | None,
        history2: Tensor | None,
        threads: int,
    ) -> tuple[Tensor, Tensor | None] | None: ...

def scheduler_seed() -> int: ...
def scheduler_noise(
    out: Tensor, seeds: Tensor | None, seed: int, offset: int, threads: int
) -> None: ...
def vq_workspace_size(n: int, k: int, d: int, metric: str) -> int: ...
def vq_nearest(
    x: Tensor,
    codebook: Tensor,
    metric: str,
    packed: Tensor | None,
    workspace: Tensor,
    indices: Tensor,
    distance: Tensor,
    threads: int,
) -> None: ...
def vq_packed_size(codebook: Tensor, metric: str, threads: int) -> int: ...
def vq_pack(codebook: Tensor, metric: str, packed: Tensor, threads: int) -> None: ...
def vq_lookup(indices: Tensor, codebook: Tensor, out: Tensor, threads: int) -> None: ...
def vq_accumulate_workspace_size(n: int, k: int) -> int: ...
def vq_accumulate(
    x: Tensor, indices: Tensor, workspace: Tensor, counts: Tensor, sums: Tensor, threads: int
) -> None: ...
def vq_quantize(
    x: Tensor,
    codebook: Tensor,
    metric: str,
    scale: float,
    workspace: Tensor,
    indices: Tensor,
    distance: Tensor,
    quantized: Tensor,
    total: Tensor,
) -> None: ...
def vq_total(distance: Tensor, scale: float, total: Tensor) -> None: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    out: Tensor,
    threads: int,
) -> None: ...
def linear_attention_workspace_size(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None, causal: bool, backward: bool
) -> int: ...
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    initial_state: Tensor | None,
    feature: str,
    causal: bool,
    normalize: bool,
    eps: float,
    scale: float,
    workspace: Tensor | None,
    out: Tensor,
    state: Tensor | None,
    threads: int,
) -> None: ...
def linear_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    initial_state: Tensor | None,
    feature: str,
    causal: bool,
    normalize: bool,
    eps: float,
    scale: float,
    workspace: Tensor | None,
    grad_out: Tensor,
    grad_state: Tensor | None,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_initial_state: Tensor | None,
    threads: int,
) -> None: ...
def masked_sample(
    logits: Tensor,
    uncond: Tensor | None,
    tokens: Tensor,
    mask_count: Tensor | None,
    seeds: Tensor,
    token_noise: Tensor | None,
    confidence_noise: Tensor | None,
    mask_token: int,
    guidance: float,
    temperature: float,
    choice_temperature: float,
    log_min_p: float,
    top_k: int,
    step: int,
    transposed: bool,
    next_tokens: Tensor,
    sampled: Tensor,
    log_probability: Tensor,
    threads: int,
) -> None: ...
def mrf_update(
    message: Tensor | None,
    unary: Tensor,
    previous: Tensor | None,
    scale: float,
    damping: float,
    temperature: float,
    next: Tensor,
    threads: int,
) -> int: ...
def mrf_low_rank_step(
    begin: Tensor,
    node: Tensor,
    weight: Tensor,
    unary: Tensor,
    row: Tensor,
    words: Tensor | None,
    a: Tensor,
    b: Tensor,
    candidate: Tensor | None,
    candidates: Tensor | None,
    temperature: float,
    said: Tensor | None,
    q: Tensor | None,
    sure: Tensor | None,
    labels: Tensor | None,
    threads: int,
) -> int: ...
def mrf_label_parts(unary: Tensor, w_c: Tensor) -> int: ...
def mrf_label_step(
    mixed: Tensor,
    w_c: Tensor,
    unary: Tensor,
    previous: Tensor | None,
    damping: float,
    temperature: float,
    logits: Tensor,
    sums: Tensor,
    next: Tensor,
) -> None: ...
def mrf_packed_size(v: int) -> int: ...
def mrf_pack(w_c: Tensor, packed: Tensor, threads: int) -> None: ...
def mrf_label_product(rows: Tensor, packed: Tensor, message: Tensor, threads: int) -> None: ...
def mrf_has_mix() -> bool: ...
def mrf_mix(
    weights: Tensor, q: Tensor, others: Tensor, labels: Tensor, message: Tensor, threads: int
) -> None: ...
def mrf_find_candidates(
    unary: Tensor, row: Tensor, candidate: Tensor, candidates: Tensor, threads: int
) -> bool: ...
def mrf_message(
    begin: Tensor,
    node: Tensor,
    weight: Tensor,
    slot: Tensor,
    row: Tensor,
    q: Tensor,
    message: Tensor,
    threads: int,
) -> None: ...
def mrf_local_step(
    begin: Tensor,
    node: Tensor,
    weight: Tensor,
    slot: Tensor,
    row: Tensor,
    q: Tensor,
    unary: Tensor,
    scale: float,
    damping: float,
    temperature: float,
    next: Tensor,
    threads: int,
) -> None: ...

MRF_MOST_WINDOW: int
MRF_MOST_MESSAGE: float

def mrf_window(
    unary: Tensor,
    known: Tensor | None,
    height: int,
    width: int,
    down: Tensor | None,
    across: Tensor,
    middle: float,
    iterations: int,
    temperature: float,
    q: Tensor,
    threads: int,
) -> int: ...
def mrf_belief_step(
    begin: Tensor,
    node: Tensor,
    weight: Tensor,
    reverse: Tensor,
    order: Tensor,
    unary: Tensor,
    w_c: Tensor,
    factors: Tensor | None,
    factor_of: Tensor | None,
    damping: float,
    temperature: float,
    from_messages: Tensor,
    to_messages: Tensor,
    threads: int,
) -> None: ...
def mrf_beliefs(
    begin: Tensor,
    node: Tensor,
    weight: Tensor,
    reverse: Tensor,
    unary: Tensor,
    w_c: Tensor,
    messages: Tensor,
    beliefs: Tensor,
    threads: int,
) -> None: ...
def mrf_icm(
    begin: Tensor,
    node: Tensor,
    weight: Tensor,
    unary: Tensor,
    w_c: Tensor,
    known: Tensor,
    sweeps: int,
    labels: Tensor,
    threads: int,
) -> int: ...
def group_norm_workspace_size(x: Tensor, groups: int, backward: bool) -> int: ...
def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    silu: bool,
    workspace: Tensor | None,
    y: Tensor,
    statistics: Tensor,
    threads: int,
) -> None: ...
def group_norm_backward(
    grad: Tensor,
    x: Tensor,
    statistics: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    workspace: Tensor | None,
    grad_x: Tensor,
    sums: Tensor,
    threads: int,
) -> None: ...
