# SPDX-License-Identifier: Apache-2.0
"""Our VectorQuantize beside that of vector-quantize-pytorch: same arguments, results and states."""

import inspect
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from t2p_fast.interop.vector_quantize_pytorch import VectorQuantize

theirs = pytest.importorskip("vector_quantize_pytorch")

SEQUENCE = (3, 20, 8)
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "plain": ({}, SEQUENCE),
    "one token": ({}, (30, 8)),
    "more dimensions, images": ({"accept_image_fmap": True}, (2, 8, 5, 6)),
    "volumes": ({"accept_3d_fmap": True}, (2, 8, 2, 3, 4)),
    "channels first": ({"channel_last": False}, (3, 8, 20)),
    "projected": ({"codebook_dim": 4}, SEQUENCE),
    "projected, images": ({"codebook_dim": 4, "accept_image_fmap": True}, (2, 8, 5, 6)),
    "projected, normed": ({"codebook_dim": 4, "layernorm_after_project_in": True}, SEQUENCE),
    "heads": ({"heads": 2, "codebook_dim": 4}, SEQUENCE),
    "heads, projected": ({"heads": 2}, SEQUENCE),
    "heads, own codebooks": (
        {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
        SEQUENCE,
    ),
    "heads, own codebooks, images": (
        {"heads": 4, "separate_codebook_per_head": True, "accept_image_fmap": True},
        (2, 8, 5, 6),
    ),
    "heads, channels first": (
        {"heads": 2, "codebook_dim": 4, "channel_last": False},
        (3, 8, 20),
    ),
    "directional, heads": (
        {"directional_reparam": True, "threshold_ema_dead_code": 1, "heads": 2, "codebook_dim": 4},
        SEQUENCE,
    ),
    "directional, own codebooks, images": (
        {
            "directional_reparam": True, "threshold_ema_dead_code": 1, "heads": 4,
            "separate_codebook_per_head": True, "accept_image_fmap": True,
        },
        (2, 8, 5, 6),
    ),
    "cosine": ({"use_cosine_sim": True}, SEQUENCE),
    "cosine, heads": ({"use_cosine_sim": True, "heads": 2, "codebook_dim": 4}, SEQUENCE),
    "cosine, images": ({"use_cosine_sim": True, "accept_image_fmap": True}, (2, 8, 5, 6)),
    "straight through": ({"straight_through": True, "rotation_trick": False}, SEQUENCE),
    "no rotation": ({"rotation_trick": False, "commitment_weight": 0.25}, SEQUENCE),
    "no commitment": ({"commitment_weight": 0.0}, SEQUENCE),
    "gradient not routed": ({"route_gradients_to_input": False}, SEQUENCE),
    "dead codes": ({"threshold_ema_dead_code": 2}, SEQUENCE),
    "dead codes, few vectors": ({"threshold_ema_dead_code": 2}, (1, 3, 8)),
    "dead codes, heads": (
        {"threshold_ema_dead_code": 2, "heads": 2, "codebook_dim": 4},
        SEQUENCE,
    ),
    "dead codes, own codebooks, cosine": (
        {
            "threshold_ema_dead_code": 2, "heads": 2, "codebook_dim": 4, "use_cosine_sim": True,
            "separate_codebook_per_head": True,
        },
        SEQUENCE,
    ),
    "k-means": ({"kmeans_init": True}, SEQUENCE),
    "k-means, cosine": ({"kmeans_init": True, "use_cosine_sim": True}, SEQUENCE),
    "k-means, heads": ({"kmeans_init": True, "heads": 2, "codebook_dim": 4}, SEQUENCE),
    "k-means, own codebooks, images": (
        {
            "kmeans_init": True, "heads": 2, "separate_codebook_per_head": True,
            "accept_image_fmap": True,
        },
        (2, 8, 5, 6),
    ),
    "learnable": ({"learnable_codebook": True, "ema_update": False}, SEQUENCE),
    "learnable, not rotated": (
        {"learnable_codebook": True, "ema_update": False, "rotation_trick": False,
         "sync_update_v": 0.3},
        SEQUENCE,
    ),
    "bridge": ({"vq_bridge": nn.Linear(8, 8)}, SEQUENCE),
    "directional": (
        {"directional_reparam": True, "threshold_ema_dead_code": 1},
        SEQUENCE,
    ),
    "orthogonal": ({"orthogonal_reg_weight": 10.0}, SEQUENCE),
    "orthogonal, some codes": (
        {"orthogonal_reg_weight": 10.0, "orthogonal_reg_active_codes_only": True,
         "orthogonal_reg_max_codes": 6},
        SEQUENCE,
    ),
    "manual averages": ({"manual_ema_update": True}, SEQUENCE),
    "no averages": ({"ema_update": False}, SEQUENCE),
    "frozen": ({"freeze_codebook": True, "threshold_ema_dead_code": 2}, SEQUENCE),
    "own optimiser": (
        {"learnable_codebook": True, "ema_update": False,
         "in_place_codebook_optimizer": partial(torch.optim.SGD, lr=0.5)},
        SEQUENCE,
    ),
}  # fmt: skip


def pair(options: dict[str, Any], k: int = 12) -> tuple[VectorQuantize, Any]:
    """Ours and theirs, from the same seed."""
    made = []
    for kind in (VectorQuantize, theirs.VectorQuantize):
        torch.manual_seed(5)
        made.append(kind(8, k, **options))
    return made[0], made[1]


def run(quantizer: Any, x: Tensor, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    """Everything that a step returns or changes."""
    torch.manual_seed(seed)
    quantizer.zero_grad()
    x = x.clone().requires_grad_()
    quantized, indices, loss, breakdown = quantizer(x, return_loss_breakdown=True, **options)
    found = {"quantized": quantized.detach(), "indices": indices, "loss": loss.detach()}
    found |= {f"loss of {k}": v.detach() for k, v in breakdown._asdict().items()}
    weight = torch.linspace(-1, 1, quantized.numel()).view(quantized.shape).to(quantized.dtype)
    total = (quantized * weight).sum() + 3 * loss
    if total.requires_grad:
        total.backward()
    found["gradient of x"] = x.grad if x.grad is not None else torch.zeros(())
    for name, parameter in quantizer.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad.clone()
    return found | {k: v.clone() for k, v in quantizer.state_dict().items()}


def check(ours: dict[str, Tensor], others: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == others.keys()
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-5}
    for name in ours:
        torch.testing.assert_close(
            ours[name], others[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", CASES)
def test_training_and_evaluation(case: str) -> None:
    options, shape = CASES[case]
    ours, other = pair(options)
    assert ours.state_dict().keys() == other.state_dict().keys()
    for step in range(3):
        torch.manual_seed(100 + step)
        x = torch.randn(shape)
        check(run(ours, x, step), run(other, x, step))
    ours.eval(), other.eval()
    check(run(ours, x), run(other, x))
    indices = ours(x)[1]
    torch.testing.assert_close(
        ours.get_codes_from_indices(indices), other.get_codes_from_indices(indices)
    )


def test_signatures() -> None:
    for name in ("__init__", "forward", "update_indices", "get_output_from_indices"):
        ours, other = (
            inspect.signature(getattr(kind, name)).parameters.values()
            for kind in (VectorQuantize, theirs.VectorQuantize)
        )
        assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in other]


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channel_last": False},
        {"use_cosine_sim": True, "threshold_ema_dead_code": 2},
        {"kmeans_init": True},
        {"learnable_codebook": True, "ema_update": False},
    ],
    ids=str,
)
def test_masks(options: dict[str, Any], zeros: bool) -> None:
    ours, other = pair({**options, "return_zeros_for_masked_padding": zeros})
    x = torch.randn(3, 20, 8)
    x = x if options.get("channel_last", True) else x.mT.contiguous()
    mask = torch.rand(3, 20) < 0.7
    for _ in range(2):
        found = run(ours, x, mask=mask)
        check(found, run(other, x, mask=mask))
    assert torch.equal(found["indices"] == -1, ~mask)
    if options.get("channel_last", True):  # there, the length is always that of dimension 1
        lens = torch.tensor([4, 20, 0])
        check(run(ours, x, lens=lens), run(other, x, lens=lens))
    ours.eval(), other.eval()
    check(run(ours, x, mask=mask), run(other, x, mask=mask))


@pytest.mark.parametrize("own", [False, True])
def test_masks_with_heads(own: bool) -> None:
    """The same as without a mask on what the mask keeps; vector-quantize-pytorch fails here."""
    options = {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": own,
               "threshold_ema_dead_code": 2, "kmeans_init": True}  # fmt: skip
    masked, plain = pair(options)[0], pair(options)[0]
    x, mask = torch.randn(1, 20, 8), torch.rand(1, 20) < 0.7
    first, second = run(masked, x, mask=mask), run(plain, x[mask][None])
    for name in ("loss", "_codebook.embed", "_codebook.cluster_size", "_codebook.embed_avg"):
        torch.testing.assert_close(first[name], second[name])
    assert torch.equal(first["indices"][mask], second["indices"][0])
    assert (first["indices"][~mask] == -1).all()
    assert torch.equal(first["quantized"][mask], second["quantized"][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    ours, other = pair({"rotation_trick": False})
    x = torch.randn(SEQUENCE).to(dtype)
    found, expected = run(ours, x), run(other, x)
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in expected.items()}
    check(found, expected, rtol=0.02, atol=0.02)


def test_state_dicts_go_either_way() -> None:
    options = {"heads": 2, "kmeans_init": True, "layernorm_after_project_in": True}
    x = torch.randn(SEQUENCE)
    for source, target in (pair(options), reversed(pair(options))):
        source(x)
        assert list(source.state_dict()) == list(target.state_dict())
        target.load_state_dict(source.state_dict(), strict=True)
        check(run(source, x), run(target, x))


@pytest.mark.parametrize("case", ["plain", "heads", "heads, own codebooks"])
def test_update_indices(case: str) -> None:
    options, shape = CASES[case]
    ours, other = pair({**options, "threshold_ema_dead_code": 1})
    x = torch.randn(shape)
    indices = ours.eval()(x)[1].roll(1, 0)
    indices.view(-1)[:2] = -1
    for quantizer in (ours.train(), other):
        torch.manual_seed(1)
        quantizer.update_indices(x, indices)
    check(ours.state_dict(), other.state_dict())


def test_update_options() -> None:
    ours, other = pair({"threshold_ema_dead_code": 1.5})
    x = torch.randn(SEQUENCE)
    weight = torch.rand(12)
    for options in (
        {"ema_update_weight": weight},
        {"ema_update_weight": lambda _, counts: counts / (1 + counts.amax())},
        {"ema_update_weight": 0.5},
        {"accum_ema_update": True},
        {"accum_ema_update": True},
        {},
        {"ema_update": False},
        {"freeze_codebook": True},
    ):
        check(run(ours, x, **options), run(other, x, **options))
    for quantizer in (ours, other):
        torch.manual_seed(1)
        quantizer._codebook.cluster_size.fill_(0)
        quantizer.expire_codes_(x[:1])
        quantizer.codebook = quantizer.codebook + 1
    check(ours.state_dict(), other.state_dict())


def test_outputs_of_projected_images() -> None:
    quantizer = VectorQuantize(8, 12, codebook_dim=3, heads=2, accept_image_fmap=True).eval()
    quantized, indices, _ = quantizer(torch.randn(2, 8, 5, 6))
    torch.testing.assert_close(quantizer.get_output_from_indices(indices), quantized)


def test_codes_are_returned_to_the_bit_and_nearest_far_from_the_origin() -> None:
    quantizer = VectorQuantize(8, 64)
    quantizer.codebook = torch.randn(64, 8) + 3000
    x = (torch.randn(1, 500, 8) + 3000).requires_grad_()
    codes = quantizer.codebook.clone()
    quantized, indices, _ = quantizer(x)
    assert torch.equal(quantized, codes[indices])
    distance = torch.cdist(x.detach().double(), codes.double())
    torch.testing.assert_close(
        distance.gather(2, indices[..., None])[..., 0], distance.amin(2), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize(
    "name",
    ["affine_param", "sync_affine_param", "codebook_diversity_loss_weight",
     "commitment_use_cross_entropy_loss", "stochastic_sample_codes"],
)  # fmt: skip
def test_options_that_are_not_carried_out(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"VectorQuantize: {name} is not carried out"):
        VectorQuantize(8, 12, **{name: True})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"straight_through": True}, "at most one of straight_through, rotation_trick"),
        ({"learnable_codebook": True}, "ema_update=False with learnable_codebook"),
        ({"sync_update_v": 2.0}, "0 <= sync_update_v <= 1, got 2.0"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        VectorQuantize(8, 12, **options)
    with pytest.raises(AssertionError):
        theirs.VectorQuantize(8, 12, **options)


def test_errors_of_forward() -> None:
    quantizer, x = VectorQuantize(8, 12), torch.randn(SEQUENCE)
    for name in ("indices", "topk", "codebook_transform_fn"):
        with pytest.raises(NotImplementedError, match=f"{name} is not carried out"):
            quantizer(x, **{name: 1})
    with pytest.raises(ValueError, match=r"mask is \[3, 8\], expected \[3, 20\]"):
        quantizer(x, mask=torch.ones(3, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"x is \[2, 8\], expected \[b, n, d\]"):
        quantizer(x[:2, 0], mask=torch.ones(2, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask or lens, got both"):
        quantizer(x, mask=torch.ones(3, 20, dtype=torch.bool), lens=torch.ones(3))
    with pytest.raises(ValueError, match=r"x is \[3, 20, 5\], expected 8 channels"):
        quantizer(x[..., :5])


PROGRAM = """
import sys
import torch
import torch.distributed as dist
from t2p_fast.interop.vector_quantize_pytorch import VectorQuantize

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
averaged = VectorQuantize(8, 12)
revived = VectorQuantize(8, 40, threshold_ema_dead_code=1, kmeans_init=True)  # draws nothing yet
batches = torch.randn(3, 2, 1, 20, 8)
torch.manual_seed(rank)
for batch in batches:
    averaged(batch[rank])
    revived(batch[rank])
torch.save([averaged.state_dict(), revived.state_dict()], f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")
def test_processes_keep_the_same_codes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM]
    runs = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    for process in runs:
        _, messages = process.communicate(timeout=300)
        assert process.returncode == 0, messages
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for mine, other in zip(first, second, strict=True):
        for name in mine:
            assert torch.equal(mine[name], other[name]), name
    torch.manual_seed(0)
    alone = VectorQuantize(8, 12)
    for batch in torch.randn(3, 2, 1, 20, 8):
        alone(batch)
    check(first[0], alone.state_dict())
