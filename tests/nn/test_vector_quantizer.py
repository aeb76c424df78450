# SPDX-License-Identifier: Apache-2.0
"""The quantiser, alone and over several processes."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from t2p_fast.nn import VectorQuantizer, codebook_usage
from t2p_fast.ops import vq_nearest


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(k: int = 6, d: int = 3, **options: object) -> VectorQuantizer:
    quantizer = VectorQuantizer(k, d, **options)  # type: ignore[arg-type]
    torch.nn.init.normal_(quantizer.embedding.weight)
    return quantizer


def rows(x: Tensor) -> Tensor:
    """[b, d, h, w] as [n, d]."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(rows(x).double(), codebook.double()).argmin(1).view(x[:, 0].shape)


def reference(x: Tensor, codebook: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Equation 3 of van den Oord et al. in plain PyTorch."""
    indices = nearest(x.detach(), codebook.detach())
    codes = codebook[indices].movedim(-1, 1)
    loss = (codes - x.detach()).square().mean() + beta * (codes.detach() - x).square().mean()
    return x + (codes - x).detach(), indices, loss


def test_gradient_codebook_is_the_reference() -> None:
    quantizer = make(beta=0.3)
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    weight = torch.randn(2, 3, 4, 5)
    quantized, indices, loss = quantizer(x)
    ((quantized * weight).sum() + 2 * loss).backward()

    y = x.detach().double().requires_grad_()
    codebook = quantizer.codebook.detach().double().requires_grad_()
    expected, expected_indices, expected_loss = reference(y, codebook, 0.3)
    ((expected * weight).sum() + 2 * expected_loss).backward()

    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(quantized, expected.float())
    torch.testing.assert_close(loss, expected_loss.float())
    torch.testing.assert_close(x.grad, y.grad.float())
    torch.testing.assert_close(quantizer.codebook.grad, codebook.grad.float())


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_gradient_passes_straight_through(ema_decay: float | None) -> None:
    quantizer = make(ema_decay=ema_decay)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    weight = torch.randn(2, 3, 4, 4)
    quantized, _, _ = quantizer(x)
    (quantized * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight)


def test_output_is_made_of_codes() -> None:
    quantizer = make()
    x = torch.randn(2, 3, 4, 5)
    quantized, indices, _ = quantizer(x)
    assert indices.dtype == torch.int64
    assert indices.shape == (2, 4, 5)
    assert torch.equal(quantized, quantizer.codebook[indices].movedim(-1, 1))
    assert torch.equal(quantizer.nearest(x), indices)
    assert torch.equal(quantizer.lookup(indices), quantized)


@pytest.mark.parametrize("shape", [(7, 3), (2, 5, 3)])
def test_channels_last(shape: tuple[int, ...]) -> None:
    quantizer = make(channel_dim=-1, ema_decay=0.5)
    x = torch.randn(shape)
    codebook = quantizer.codebook.clone()
    quantized, indices, _ = quantizer(x)
    assert torch.equal(indices, torch.cdist(x, codebook).argmin(-1))
    assert torch.equal(quantized, codebook[indices])
    assert quantizer.lookup(indices).shape == shape


class ByHand:
    """The moving averages of appendix A.1, one code at a time."""

    def __init__(self, codebook: Tensor, decay: float) -> None:
        self.codes = codebook.double().clone()
        self.count = [0.0] * len(codebook)
        self.sum = torch.zeros_like(self.codes)
        self.decay = decay

    def update(self, x: Tensor, indices: Tensor) -> None:
        vectors = rows(x.double())
        for j in range(len(self.codes)):
            mine = vectors[indices.flatten() == j]
            self.count[j] = self.decay * self.count[j] + (1 - self.decay) * len(mine)
            self.sum[j] = self.decay * self.sum[j] + (1 - self.decay) * mine.sum(0)
            if self.count[j] > 1e-6:
                self.codes[j] = self.sum[j] / self.count[j]


@given(seed=st.integers(0, 99), decay=st.floats(0.0, 0.99), steps=st.integers(1, 4))
def test_moving_average_codebook_by_hand(seed: int, decay: float, steps: int) -> None:
    torch.manual_seed(seed)
    quantizer = make(k=9, ema_decay=decay, beta=0.7)
    by_hand = ByHand(quantizer.codebook.detach(), decay)
    for _ in range(steps):
        x = torch.randn(2, 3, 2, 2)  # 8 vectors: some of the 9 codes are not chosen
        before = quantizer.codebook.clone()
        quantized, indices, loss = quantizer(x)
        # This step's output is of the codebook as it was before it.
        assert torch.equal(indices, nearest(x, before))
        assert torch.equal(quantized, before[indices].movedim(-1, 1))
        torch.testing.assert_close(loss, 0.7 * (quantized - x).square().mean())
        by_hand.update(x, indices)
        torch.testing.assert_close(quantizer.codebook.double(), by_hand.codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantizer.ema_count.tolist(), by_hand.count, rtol=1e-5, atol=1e-6)


def test_moving_average_loss_has_no_codebook_gradient() -> None:
    quantizer = make(ema_decay=0.9, beta=0.4)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    before = quantizer.codebook.clone()
    quantized, indices, loss = quantizer(x)
    loss.backward()
    codes = before[indices].movedim(-1, 1)
    torch.testing.assert_close(x.grad, 0.4 * 2 * (x - codes).detach() / x.numel())
    assert quantizer.codebook.grad is None
    assert not torch.equal(quantizer.codebook, before)  # updated without breaking backward
    assert torch.equal(quantized, codes)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_evaluation_changes_nothing(ema_decay: float | None) -> None:
    quantizer = make(ema_decay=ema_decay, dead_code_threshold=100.0, kmeans_init=True).eval()
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    for _ in range(2):
        quantizer(torch.randn(2, 3, 4, 4))
    for key, value in quantizer.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert quantizer.needs_init


def test_kmeans_places_the_codes() -> None:
    """Four well separated clouds: whichever vectors it starts from, the centres are found."""
    centres = 10 * torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    x = (centres.repeat(8, 1) + 0.1 * torch.randn(32, 3)).T.reshape(1, 3, 4, 8)
    quantizer = VectorQuantizer(4, 3, ema_decay=0.9, kmeans_init=True)
    _, indices, loss = quantizer(x)
    assert not quantizer.needs_init
    assert len(indices.unique()) == 4
    assert float(loss) < 0.1
    first = quantizer.ema_count.clone()
    torch.testing.assert_close(first, torch.full((4,), 0.9 * 1 + 0.1 * 8))
    quantizer(x + 1)  # the second batch moves the codes, it does not place them anew
    assert float((quantizer.codebook - quantizer.codebook.round()).abs().max()) < 0.5
    distance = torch.cdist(quantizer.codebook, centres).min(1).values
    assert float(distance.max()) < 1.0


def test_kmeans_for_a_gradient_codebook() -> None:
    quantizer = VectorQuantizer(4, 3, kmeans_init=True)
    x = 5 + torch.randn(1, 3, 4, 8)
    quantizer(x)
    assert float(quantizer.codebook.detach().mean()) > 3
    assert quantizer.codebook.requires_grad


def test_loaded_codes_are_not_placed_anew() -> None:
    trained = make(k=4, ema_decay=0.9, kmeans_init=True)
    x = torch.randn(2, 3, 4, 4)
    trained(x)
    resumed = VectorQuantizer(4, 3, ema_decay=0.9, kmeans_init=True)
    resumed.load_state_dict(trained.state_dict())
    trained(x)
    resumed(x)
    assert torch.equal(resumed.codebook, trained.codebook)


def test_revival_replaces_only_dead_codes() -> None:
    quantizer = VectorQuantizer(5, 2, ema_decay=0.5, dead_code_threshold=0.3)
    quantizer.codebook.copy_(
        torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [99.0, 99.0], [-99.0, 99.0]])
    )
    clouds = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]).repeat_interleave(4, 0)
    x = (clouds + 0.1 * torch.randn(12, 2)).T.reshape(1, 2, 3, 4)
    quantizer(x)
    vectors = rows(x)
    for code in (3, 4):
        assert (vectors == quantizer.codebook[code]).all(1).any(), "not one of the input vectors"
        assert torch.equal(quantizer.ema_sum[code], quantizer.codebook[code])
    assert quantizer.ema_count.tolist() == [2, 2, 2, 1, 1]
    torch.testing.assert_close(quantizer.codebook[0], vectors[:4].mean(0))
    torch.testing.assert_close(quantizer.codebook[2], vectors[8:].mean(0))


def test_without_a_threshold_dead_codes_stay() -> None:
    quantizer = make(ema_decay=0.5)
    quantizer.codebook[5] = 99.0
    quantizer(torch.randn(2, 3, 4, 4))
    assert torch.equal(quantizer.codebook[5], torch.full((3,), 99.0))


def test_state_dict() -> None:
    assert set(make().state_dict()) == {"embedding.weight"}
    assert set(make(ema_decay=0.9).state_dict()) == {"embedding.weight", "ema_count", "ema_sum"}
    assert [p.requires_grad for p in make(ema_decay=0.9).parameters()] == [False]


def test_half_precision_input_is_quantized_in_float32() -> None:
    quantizer = make()
    quantized, _, loss = quantizer(torch.randn(2, 3, 4, 4).bfloat16())
    assert quantized.dtype == loss.dtype == torch.float32


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"codebook is \[0, 3\], expected at least one code"):
        VectorQuantizer(0, 3)
    with pytest.raises(ValueError, match=r"ema_decay is 1\.0, expected 0 <= decay < 1"):
        VectorQuantizer(4, 3, ema_decay=1.0)
    with pytest.raises(ValueError, match=r"k-means needs at least 6 vectors, x has 4"):
        make(kmeans_init=True)(torch.randn(1, 3, 2, 2))
    with pytest.raises(ValueError, match=r"4 channels.*codebook|codebook.*\[6, 3\]"):
        make()(torch.randn(1, 4, 2, 2))


PROGRAM = """
import sys, torch
import torch.distributed as dist
from t2p_fast.nn import ResidualVQ, VectorQuantizer, codebook_usage
from t2p_fast.ops import vq_nearest

rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
torch.manual_seed(0)
averaged = VectorQuantizer(6, 3, ema_decay=0.8)
revived = VectorQuantizer(32, 3, ema_decay=0.8, dead_code_threshold=0.5)
placed = VectorQuantizer(6, 3, ema_decay=0.8, kmeans_init=True)
residual = ResidualVQ(
    num_quantizers=4, num_embeddings=6, embedding_dim=3, ema_decay=0.8, quantizer_dropout=0.7
)
data = torch.randn(4, 2, 3, 2, 4)  # steps, processes, ...
torch.manual_seed(100 + rank)  # each process draws its own vectors for revival, and dropout
for step in data:
    mine = step[rank : rank + 1] if world > 1 else step
    for quantizer in (averaged, revived, placed, residual):
        quantizer(mine)
states = [q.state_dict() for q in (averaged, revived, placed, residual)]
torch.save(states, f"{out}/{world}-{rank}.pt")
if world > 1:
    dist.destroy_process_group()
"""


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")
def test_processes_keep_the_same_codes(tmp_path: Path) -> None:
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(world), str(tmp_path / "store"),
             str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, world in ((0, 2), (1, 2), (0, 1))
    ]  # fmt: skip
    for run in runs:
        _, messages = run.communicate(timeout=900)
        assert run.returncode == 0, messages
    first, second, alone = (torch.load(tmp_path / f"{n}.pt") for n in ("2-0", "2-1", "1-0"))
    for mine, other in zip(first, second, strict=True):
        for key in mine:
            assert torch.equal(mine[key], other[key]), key
    # Without anything random, two processes are one process with both their batches.
    for key in first[0]:
        torch.testing.assert_close(first[0][key], alone[0][key], rtol=1e-5, atol=1e-6)


def test_cosine_codes_have_length_one() -> None:
    quantizer = make(k=20, d=6, metric="cosine", beta=0.3)
    x = torch.randn(2, 6, 4, 5, requires_grad=True)
    quantized, indices, _ = quantizer(x)
    directions = torch.nn.functional.normalize(x, dim=1)
    codes = torch.nn.functional.normalize(quantizer.codebook, dim=1)
    cosine = rows(directions) @ codes.T
    assert torch.equal(indices.flatten(), cosine.argmax(1))
    torch.testing.assert_close(quantized.norm(dim=1), torch.ones(2, 4, 5))
    assert torch.equal(quantizer.nearest(7 * x), indices)
    assert torch.equal(quantizer.lookup(indices), quantized.detach())
    quantized.sum().backward()
    assert (x.grad * x).sum(1).abs().max() < 1e-5  # length does not matter


def test_cosine_moving_averages_learn_directions() -> None:
    quantizer = make(k=2, d=2, metric="cosine", ema_decay=0.5, channel_dim=-1)
    quantizer.codebook.data = torch.tensor([[1.0, 0.1], [0.1, 1.0]])
    x = torch.tensor([[3.0, 0.0], [0.0, 0.2]]).repeat(8, 1)
    for _ in range(20):
        quantizer(x)
    torch.testing.assert_close(quantizer.codes(), torch.eye(2), rtol=0, atol=1e-3)


def test_rotation_gradient_is_the_rotation() -> None:
    """Against the matrix ``|c|/|x| (I - 2 r r^T + 2 c' x'^T)``, one vector at a time."""
    quantizer = make(k=9, d=4, channel_dim=-1, gradient="rotation")
    x = torch.randn(30, 4, requires_grad=True)
    weight = torch.randn(30, 4)
    quantized, indices, _ = quantizer(x)
    assert torch.equal(quantized, quantizer.codebook[indices])
    (quantized * weight).sum().backward()
    for i in range(30):
        e, c = x[i].detach().double(), quantizer.codebook[indices[i]].detach().double()
        r = e / e.norm() + c / c.norm()
        r = r / r.norm()
        matrix = (c.norm() / e.norm()) * (
            torch.eye(4, dtype=torch.float64) - 2 * torch.outer(r, r)
            + 2 * torch.outer(c / c.norm(), e / e.norm())
        )  # fmt: skip
        torch.testing.assert_close(matrix @ e, c)  # it takes x to its code
        expected = matrix.T @ weight[i].double()
        torch.testing.assert_close(x.grad[i].double(), expected, rtol=1e-5, atol=1e-5)


def test_usage() -> None:
    even = codebook_usage(torch.arange(8).repeat(3), 8)
    torch.testing.assert_close(even.perplexity, torch.tensor(8.0))
    assert even.used == 1
    one = codebook_usage(torch.full((5,), 3), 8)
    assert (float(one.perplexity), float(one.used)) == (1.0, 0.125)
    skewed = codebook_usage(torch.tensor([0, 0, 0, 1, -1]), 4)
    torch.testing.assert_close(skewed.perplexity, torch.tensor(2.0**0.8112781))


def test_a_failed_load_keeps_the_kmeans_start() -> None:
    quantizer = make(kmeans_init=True)
    quantizer.load_state_dict({}, strict=False)
    assert quantizer.needs_init
    quantizer.load_state_dict(make().state_dict())
    assert not quantizer.needs_init


def test_nothing_to_quantise_in_training() -> None:
    quantizer = make(ema_decay=0.9, dead_code_threshold=1.0)
    quantized, indices, loss = quantizer(torch.empty(0, 3, 2, 2))
    assert (quantized.shape, indices.shape, float(loss)) == ((0, 3, 2, 2), (0, 2, 2), 0.0)
    assert quantizer.codebook.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_moving_averages_in_other_dtypes(dtype: torch.dtype) -> None:
    quantizer = make(ema_decay=0.9).to(dtype)
    quantized, _, loss = quantizer(torch.randn(2, 3, 4, 4, dtype=dtype))
    assert quantizer.codebook.dtype == dtype
    assert quantized.isfinite().all()
    assert loss.isfinite()


def test_training_compiles() -> None:
    quantizer = make(k=8, ema_decay=0.9, dead_code_threshold=0.05)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    x = torch.randn(4, 3, 5, 5)
    _, indices, _ = compiled(x)
    assert indices.shape == (4, 5, 5)
    assert quantizer.ema_count.sum() > 0


def test_option_errors() -> None:
    with pytest.raises(ValueError, match="metric is 'dot', expected 'l2' or 'cosine'"):
        make(metric="dot")
    with pytest.raises(ValueError, match="gradient is 'none'"):
        make(gradient="none")


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_nearest_follows_the_codebook(metric: Literal["l2", "cosine"]) -> None:
    """What is kept of the codebook between calls must not outlive a change of it."""
    quantizer = VectorQuantizer(50, 8, metric=metric, channel_dim=-1).eval()
    x = torch.randn(40, 8)

    def check(quantizer: VectorQuantizer) -> None:
        expected = vq_nearest(x, quantizer.codebook.detach(), metric=metric)
        assert torch.equal(quantizer.nearest(x), expected)
        assert torch.equal(quantizer.nearest(x), expected)

    check(quantizer)
    with torch.no_grad():
        quantizer.codebook.normal_()
    check(quantizer)
    quantizer.load_state_dict({"embedding.weight": torch.randn(50, 8)})
    check(quantizer)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    quantizer.codebook.grad = torch.randn(50, 8)
    optimizer.step()
    check(quantizer)
    check(copy.deepcopy(quantizer))
    check(pickle.loads(pickle.dumps(quantizer)))
    check(quantizer.bfloat16().float())  # in memory that was just freed
