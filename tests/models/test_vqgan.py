# SPDX-License-Identifier: Apache-2.0
"""The tokenizer: the published layout, locality, and tiles."""

import re
from collections import Counter
from itertools import product

import pytest
import torch
from torch import Tensor

from t2p_fast.models.tiling import count_tiles, decode_tiled, encode_tiled
from t2p_fast.models.vqgan import VQGAN, VQGANConfig
from tiny_models import make_vqgan, one_thread, vqgan_config  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


def published_patterns() -> Counter[str]:
    """Keys of the published f16 checkpoint with 16384 codes, numbers as {}, and how many."""
    keys: Counter[str] = Counter()
    block, attention = ("norm1", "conv1", "norm2", "conv2"), ("norm", "q", "k", "v", "proj_out")
    for side in ("encoder", "decoder"):
        for name in ("conv_in", "norm_out", "conv_out"):
            keys[f"{side}.{name}"] = 1
        for number, name in product((1, 2), block):
            keys[f"{side}.mid.block_{number}.{name}"] = 1
        for name in attention:
            keys[f"{side}.mid.attn_1.{name}"] = 1
    for name in block:
        keys[f"encoder.down.{{}}.block.{{}}.{name}"] = 10
        keys[f"decoder.up.{{}}.block.{{}}.{name}"] = 15
    for name in attention:
        keys[f"encoder.down.{{}}.attn.{{}}.{name}"] = 2
        keys[f"decoder.up.{{}}.attn.{{}}.{name}"] = 3
    keys["encoder.down.{}.block.{}.nin_shortcut"] = 2
    keys["decoder.up.{}.block.{}.nin_shortcut"] = 2
    keys["encoder.down.{}.downsample.conv"] = 4
    keys["decoder.up.{}.upsample.conv"] = 4
    keys["quant_conv"] = keys["post_quant_conv"] = 1
    both = Counter({f"{k}.{what}": n for k, n in keys.items() for what in ("weight", "bias")})
    both["quantize.embedding.weight"] = 1
    return both


def test_published_f16_16384() -> None:
    with torch.device("meta"):
        vqgan = VQGAN(VQGANConfig())
    assert sum(p.numel() for p in vqgan.parameters()) == 76_073_859
    state = vqgan.state_dict()
    assert Counter(re.sub(r"\.\d+\b", ".{}", key) for key in state) == published_patterns()
    for key, shape in {
        "encoder.conv_in.weight": [128, 3, 3, 3],
        "encoder.down.0.block.0.norm1.weight": [128],
        "encoder.down.2.block.0.nin_shortcut.weight": [256, 128, 1, 1],
        "encoder.down.3.downsample.conv.weight": [256, 256, 3, 3],
        "encoder.down.4.block.0.conv1.weight": [512, 256, 3, 3],
        "encoder.down.4.attn.1.q.weight": [512, 512, 1, 1],
        "encoder.mid.attn_1.proj_out.weight": [512, 512, 1, 1],
        "encoder.conv_out.weight": [256, 512, 3, 3],
        "decoder.conv_in.weight": [512, 256, 3, 3],
        "decoder.up.4.attn.2.v.bias": [512],
        "decoder.up.3.block.0.nin_shortcut.weight": [256, 512, 1, 1],
        "decoder.up.1.block.0.conv1.weight": [128, 256, 3, 3],
        "decoder.up.1.upsample.conv.weight": [128, 128, 3, 3],
        "decoder.up.0.block.2.conv2.weight": [128, 128, 3, 3],
        "decoder.conv_out.weight": [3, 128, 3, 3],
        "quantize.embedding.weight": [16384, 256],
        "quant_conv.weight": [256, 256, 1, 1],
    }.items():
        assert list(state[key].shape) == shape, key
    assert VQGANConfig().token_grid == 16


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"encoder_kernel_size": 3},
        {"norm_type": "group", "norm_num_groups": 4, "mid_attention": True},
        {"attn_resolutions": (8,), "layers_per_block": 2},
        {"block_out_channels": (8,), "sample_size": 4},
    ],
)
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_shapes(changes: dict[str, object], size: tuple[int, int]) -> None:
    vqgan = make_vqgan(**changes)
    f = vqgan.config.downsampling_factor
    grid = (2, size[0] // f, size[1] // f)
    pictures = torch.rand(2, 3, *size) * 2 - 1
    reconstruction, indices, loss = vqgan(pictures)
    assert reconstruction.shape == pictures.shape
    assert indices.shape == grid
    assert loss.shape == ()
    assert torch.equal(vqgan.encode_to_indices(pictures), indices)
    torch.testing.assert_close(vqgan.decode_indices(indices), reconstruction)


def test_every_token_depends_on_its_own_patch_alone() -> None:
    vqgan = make_vqgan(num_vq_embeddings=256)
    torch.manual_seed(1)
    pictures = torch.rand(1, 3, 16, 16) * 2 - 1
    changed = pictures.clone()
    changed[:, :, 4:8, 8:12] = torch.rand(3, 4, 4) * 2 - 1
    different = (vqgan.encode(pictures) != vqgan.encode(changed)).any(1)[0]
    assert different.nonzero().tolist() == [[1, 2]]
    # With 3x3 kernels the neighbours see it.
    vqgan = make_vqgan(encoder_kernel_size=3)
    different = (vqgan.encode(pictures) != vqgan.encode(changed)).any(1)[0]
    assert different.sum() > 1


def test_without_quantization_gradients_reach_every_parameter_but_change_no_code() -> None:
    vqgan = VQGAN(vqgan_config()).train()
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    made, indices, loss = vqgan(pictures, quantize=False)
    assert torch.equal(indices, vqgan.encode_to_indices(pictures))
    torch.testing.assert_close(made, vqgan.decode(vqgan.encode(pictures)))
    assert float(loss.detach()) == 0
    (made.square().mean() + loss).backward()
    for name, parameter in vqgan.named_parameters():
        assert parameter.grad is not None, name
    assert vqgan.quantize.codebook.grad is not None
    assert not vqgan.quantize.codebook.grad.any()


def test_gradient_passes_the_codebook_on_its_way_to_the_encoder() -> None:
    vqgan = VQGAN(vqgan_config(ema_decay=0.9)).train()
    made, _, loss = vqgan(torch.rand(2, 3, 16, 16) * 2 - 1)
    (made.square().mean() + loss).backward()
    assert vqgan.encoder.conv_in.weight.grad is not None
    assert vqgan.encoder.conv_in.weight.grad.any()
    assert not vqgan.quantize.codebook.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    vqgan = make_vqgan()
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    exact = vqgan.decode_indices(vqgan.encode_to_indices(pictures))
    tokens = vqgan.encode_to_indices(pictures)
    half = vqgan.to(dtype).decode_indices(tokens)
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.1)
    assert vqgan.encode_to_indices(pictures.to(dtype)).dtype == torch.int64


def test_errors() -> None:
    vqgan = make_vqgan()
    with pytest.raises(ValueError, match=r"\[1, 4, 16, 16\], expected \[b, 3, h, w\]"):
        vqgan.encode(torch.zeros(1, 4, 16, 16))
    with pytest.raises(ValueError, match=r"\[3, 16, 16\], expected \[b, 3, h, w\]"):
        vqgan.encode(torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match=r"height and width must be multiples of 4"):
        vqgan.encode(torch.zeros(1, 3, 16, 18))
    with pytest.raises(ValueError, match=r"encode_tiled.*multiples of 4"):
        encode_tiled(vqgan, torch.zeros(1, 3, 18, 16))
    for changes, message in (
        ({"encoder_kernel_size": 5}, "encoder_kernel_size is 5, expected 1 or 3"),
        ({"norm_type": "batch"}, "norm_type is 'batch', expected 'group' or 'rms'"),
        ({"sample_size": 18}, "sample_size is 18, expected a multiple of the downsampling factor"),
        ({"block_out_channels": ()}, r"block_out_channels is \(\), expected one to ten numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            vqgan_config(**changes)
    for changes in ({"in_channels": 1}, {"out_channels": 4}):
        with pytest.raises(
            ValueError, match=r"^op: vqgan has \d channels in and \d out, expected 3"
        ):
            make_vqgan(**changes).check_rgb("op")
    vqgan.check_rgb("op")


# Receptive field of the decoder at one halving: 9 tokens of convolutions at the resolution of the
# tokens, 3 of those at twice that, rounded up.
HALVING = {"block_out_channels": (4, 4), "latent_channels": 4, "vq_embed_dim": 2}
RECEPTIVE_FIELD = 13


@pytest.fixture(scope="module")
def halving() -> VQGAN:
    return make_vqgan(**HALVING, encoder_kernel_size=3)


def tokens_of(rows: int, columns: int) -> Tensor:
    return torch.randint(16, (2, rows, columns), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("rows", "columns"), [(40, 9), (7, 33), (8, 8), (1, 1)])
def test_tiles_are_the_whole_if_the_margin_is_wide_enough(
    halving: VQGAN, rows: int, columns: int
) -> None:
    tokens = tokens_of(rows, columns)
    whole = halving.decode_indices(tokens)
    calls: list[int] = []
    tiled = decode_tiled(
        halving, tokens, tile=8, margin=RECEPTIVE_FIELD, on_tile=lambda: calls.append(1)
    )
    torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-5)
    assert len(calls) == count_tiles(rows, columns, 8)
    made = encode_tiled(halving, whole.clamp(-1, 1), tile=8, margin=RECEPTIVE_FIELD)
    assert torch.equal(made, halving.encode_to_indices(whole.clamp(-1, 1)))


def test_without_a_margin_the_tiles_show(halving: VQGAN) -> None:
    tokens = tokens_of(24, 24)
    difference = decode_tiled(halving, tokens, tile=8, margin=0) - halving.decode_indices(tokens)
    assert difference.abs().max() > 1e-3


def test_patchwise_encoder_needs_no_margin() -> None:
    vqgan = make_vqgan()
    torch.manual_seed(0)
    pictures = torch.rand(1, 3, 44, 36) * 2 - 1
    tiled = encode_tiled(vqgan, pictures, tile=4, margin=0)
    assert torch.equal(tiled, vqgan.encode_to_indices(pictures))
