# SPDX-License-Identifier: Apache-2.0
"""Our VectorQuantize beside that of vector-quantize-pytorch: same arguments, results and states."""

import inspect
from functools import partial
from typing import Any

import pytest
import torch
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
