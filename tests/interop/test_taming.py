# SPDX-License-Identifier: Apache-2.0
"""Our quantisers of taming-transformers beside their definition in plain PyTorch."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from t2p_fast.interop.taming import VectorQuantizer, VectorQuantizer2

USED = [3, 9, 4, 20, 31, 9]  # of 32 codes; one twice


def by_definition(
    quantizer: VectorQuantizer2, z: Tensor, *, legacy: bool, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, loss and indices ``[b, h, w]`` in float64."""
    z, codebook = z.double(), quantizer.embedding.weight.double()
    rows = z.permute(0, 2, 3, 1)
    indices = (rows[..., None, :] - codebook).square().sum(-1).argmin(-1)
    codes = codebook[indices]
    towards_code = (codes.detach() - rows).square().mean()
    towards_input = (codes - rows.detach()).square().mean()
    loss = towards_code + beta * towards_input if legacy else beta * towards_code + towards_input
    return (rows + (codes - rows).detach()).permute(0, 3, 1, 2), loss, indices


def gradients(quantizer: nn.Module, z: Tensor, quantized: Tensor, loss: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 1, quantized.numel()).view(quantized.shape)
    total = (quantized * weight.to(quantized.dtype)).sum() + loss
    return list(torch.autograd.grad(total, [z, *quantizer.parameters()]))


@pytest.fixture
def z() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 4, 5, 6, requires_grad=True)


def make(kind: type = VectorQuantizer2, *args: Any, **options: Any) -> Any:
    quantizer = kind(32, 4, 0.3, *args, **options)
    nn.init.normal_(quantizer.embedding.weight)
    return quantizer


@pytest.fixture
def used(tmp_path: Path) -> str:
    path = tmp_path / "used.npy"
    numpy.save(path, numpy.array(USED))
    return str(path)


@pytest.mark.parametrize("sane", [False, True])
@pytest.mark.parametrize("legacy", [None, True, False])
def test_quantizer(z: Tensor, legacy: bool | None, sane: bool) -> None:
    options = {} if legacy is None else {"legacy": legacy}
    quantizer = make(sane_index_shape=sane, **options)
    quantized, loss, (perplexity, encodings, indices) = quantizer(z)
    expected = by_definition(quantizer, z, legacy=legacy is not False, beta=0.3)
    assert perplexity is None
    assert encodings is None
    torch.testing.assert_close(quantized.double(), expected[0])
    torch.testing.assert_close(loss.double(), expected[1])
    assert torch.equal(indices, expected[2] if sane else expected[2].flatten())
    assert quantized.is_contiguous()
    for ours, theirs in zip(
        gradients(quantizer, z, quantized, loss),
        gradients(quantizer, z, *expected[:2]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    codes = quantizer.embedding.weight[expected[2]].permute(0, 3, 1, 2)
    assert torch.equal(quantized, codes)
    assert torch.equal(quantizer.get_codebook_entry(indices, (2, 5, 6, 4)), codes)
    flat = quantizer.get_codebook_entry(indices.flatten(), None)
    assert torch.equal(flat, codes.permute(0, 2, 3, 1).reshape(-1, 4))


@pytest.mark.parametrize("sane", [False, True])
@pytest.mark.parametrize("unknown", ["random", "extra", 1])
def test_remap(z: Tensor, used: str, unknown: str | int, sane: bool) -> None:
    quantizer = make(remap=used, unknown_index=unknown, sane_index_shape=sane)
    assert list(quantizer.state_dict()) == ["used", "embedding.weight"]
    assert quantizer.re_embed == len(USED) + (unknown == "extra")
    torch.manual_seed(1)
    quantized, _, (_, _, indices) = quantizer(z)
    every = by_definition(quantizer, z, legacy=True, beta=0.3)[2]
    torch.manual_seed(1)
    missing = [i for i in every.flatten().tolist() if i not in USED]
    instead = {"random": torch.randint(0, len(USED), (len(missing),)).tolist()}.get(
        str(unknown), [len(USED) if unknown == "extra" else 1] * len(missing)
    )
    assert missing
    expected = torch.tensor(
        [USED.index(i) if i in USED else instead.pop(0) for i in every.flatten().tolist()]
    )
    assert indices.shape == ((2, 5, 6) if sane else (60, 1))
    assert torch.equal(indices.flatten(), expected)
    back = torch.tensor([*USED, USED[0]])[expected]
    before = indices.clone()
    assert torch.equal(quantizer.unmap_to_all(indices).flatten(), back)
    assert torch.equal(indices, before)
    entry = quantizer.get_codebook_entry(indices, (2, 5, 6, 4))
    assert torch.equal(entry.permute(0, 2, 3, 1).reshape(-1, 4), quantizer.embedding.weight[back])
    known = torch.isin(every, torch.tensor(USED))[:, None].expand_as(quantized)
    assert torch.equal(entry[known], quantized[known])


def test_older_quantizer(z: Tensor) -> None:
    quantizer = make(VectorQuantizer)
    quantized, loss, (perplexity, encodings, indices) = quantizer(z)
    expected = by_definition(quantizer, z, legacy=True, beta=0.3)
    torch.testing.assert_close(quantized.double(), expected[0])
    torch.testing.assert_close(loss.double(), expected[1])
    assert torch.equal(indices, expected[2].view(-1, 1))
    one_hot = nn.functional.one_hot(expected[2].flatten(), 32).float()
    assert torch.equal(encodings, one_hot)
    share = one_hot.mean(0)
    torch.testing.assert_close(perplexity, torch.exp(-(share * (share + 1e-10).log()).sum()))
    for ours, theirs in zip(
        gradients(quantizer, z, quantized, loss),
        gradients(quantizer, z, *expected[:2]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    entry = quantizer.get_codebook_entry(indices[:, 0], (2, 5, 6, 4))
    assert torch.equal(entry, quantized)


@pytest.mark.parametrize("kind", [VectorQuantizer, VectorQuantizer2])
def test_start_and_state(kind: type[VectorQuantizer2]) -> None:
    quantizer = kind(32, 4, beta=0.25)
    assert list(quantizer.state_dict()) == ["embedding.weight"]
    assert quantizer.embedding.weight.abs().max() <= 1 / 32


def test_half_precision(z: Tensor) -> None:
    quantizer = make().to(torch.bfloat16)
    quantized, loss, (_, _, indices) = quantizer(z.detach().bfloat16())
    codes = quantizer.embedding.weight[indices.view(2, 5, 6)].permute(0, 3, 1, 2)
    assert torch.equal(quantized, codes)
    assert loss.dtype == torch.float32
    assert make()(z.detach().bfloat16())[0].dtype == torch.float32  # as sums of the two are


def test_errors(z: Tensor, tmp_path: Path) -> None:
    quantizer = make()
    for options in ({"temp": 0.5}, {"rescale_logits": True}, {"return_logits": True}):
        with pytest.raises(ValueError, match="they are for the Gumbel quantiser"):
            quantizer(z, **options)
    quantizer(z, temp=1.0)
    with pytest.raises(ValueError, match=r"z is \[2, 3, 5, 6\], expected \[b, 4, h, w\]"):
        quantizer(z[:, :3])
    path = tmp_path / "used.npy"
    numpy.save(path, numpy.array([1, 32]))
    with pytest.raises(ValueError, match=r"used.npy holds .* expected a list of indices below 32"):
        make(remap=str(path))
    numpy.save(path, numpy.array([1, 2]))
    with pytest.raises(ValueError, match="unknown_index is 'other', expected 'random'"):
        make(remap=str(path), unknown_index="other")
