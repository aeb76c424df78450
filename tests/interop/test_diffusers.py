# SPDX-License-Identifier: Apache-2.0
"""Pipelines of diffusers with tiny random weights give the same pictures with our ops in them."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from t2p_fast import schedulers

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
interop = pytest.importorskip("t2p_fast.interop.diffusers")

accelerate = interop.accelerate

# What diffusers says of its own pipelines and configurations.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def _awake(model: nn.Module) -> nn.Module:
    """Norms that start as ones and zeros would hide a mistake."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval().requires_grad_(False)


def _unet(**options: Any) -> nn.Module:
    return _awake(
        diffusers.UNet2DModel(
            sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=8,
            block_out_channels=(16, 32), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8, **options,
        )
    )  # fmt: skip


def _vq_model(**options: Any) -> nn.Module:
    model = diffusers.VQModel(
        in_channels=3, out_channels=3, block_out_channels=(16, 16), norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3, num_vq_embeddings=64, **options,
    )  # fmt: skip
    nn.init.normal_(model.quantize.embedding.weight)
    return _awake(model)


def _kl_model() -> nn.Module:
    return _awake(
        diffusers.AutoencoderKL(
            block_out_channels=(16, 32), norm_num_groups=8, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )
    )  # fmt: skip


def _conditional_unet() -> nn.Module:
    return _awake(
        diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
            cross_attention_dim=24, attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    )  # fmt: skip


def _stable_diffusion() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.StableDiffusionPipeline(
        vae=_kl_model(), text_encoder=None, tokenizer=None, unet=_conditional_unet(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    prompt, negative = torch.randn(2, 1, 7, 24, generator=generator)
    return pipe, {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "height": 16,
                  "width": 16}  # fmt: skip


def _latent_diffusion() -> tuple[Any, dict[str, Any]]:
    return diffusers.LDMPipeline(_vq_model(), _unet(), diffusers.DDIMScheduler()), {}


def _pixel_diffusion() -> tuple[Any, dict[str, Any]]:
    unet = _unet(resnet_time_scale_shift="scale_shift")
    # No noise after the start: ours comes from another generator.
    return diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler()), {"batch_size": 2}


@pytest.fixture(params=[_stable_diffusion, _latent_diffusion, _pixel_diffusion])
def pipeline(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    pipe, options = request.param()
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**options, "num_inference_steps": 3, "output_type": "np"}


def _draw(pipe: Any, options: dict[str, Any]) -> Tensor:
    return torch.from_numpy(pipe(generator=torch.Generator().manual_seed(3), **options).images)


def test_pictures_are_the_same(pipeline: tuple[Any, dict[str, Any]]) -> None:
    pipe, options = pipeline
    scheduler, before = pipe.scheduler, _draw(pipe, options)
    keys = {name: list(m.state_dict()) for name, m in pipe.components.items()
            if isinstance(m, nn.Module)}  # fmt: skip
    swapped = accelerate(pipe)
    assert {"scheduler", "group_norm", "attention"} <= {swap.op for swap in swapped.swaps}
    assert not swapped.kept
    assert type(pipe.scheduler).__module__.startswith("t2p_fast.")
    assert any("ResnetBlock2D" in swap.what for swap in swapped.swaps)
    assert any(swap.path.endswith("conv_norm_out") for swap in swapped.swaps)
    torch.testing.assert_close(_draw(pipe, options), before, rtol=0, atol=2e-5)
    for name, names in keys.items():
        assert list(pipe.components[name].state_dict()) == names
    assert "group_norm: ResnetBlock2D" in str(swapped)

    again = accelerate(pipe)
    assert not [
        swap for swap in again.swaps if "norm1" not in swap.path and "norm2" not in swap.path
    ]
    again.restore()
    swapped.restore()
    swapped.restore()
    assert pipe.scheduler is scheduler
    for module in itertools.chain(*(m.modules() for m in pipe.components.values()
                                    if isinstance(m, nn.Module))):  # fmt: skip
        assert "forward" not in vars(module)
    assert torch.equal(_draw(pipe, options), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_models_with_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = _unet(resnet_time_scale_shift="scale_shift").to(dtype).requires_grad_(True).train()
    x = torch.randn(2, 3, 16, 16, dtype=dtype).to(memory_format=torch.channels_last)

    def run() -> list[Tensor]:
        model.zero_grad()
        y = model(x, 10).sample
        y.square().mean().backward()
        return [y.detach(), *(p.grad.clone() for p in model.parameters())]

    before = run()
    swapped = accelerate(model)
    assert {swap.op for swap in swapped.swaps} == {"group_norm", "attention"}
    tolerance = {torch.float32: 2e-4, torch.bfloat16: 0.1, torch.float64: 1e-12}[dtype]
    for ours, theirs in zip(run(), before, strict=True):
        scale = float(theirs.double().abs().max()) + 1e-3
        assert float((ours - theirs).double().abs().max()) <= tolerance * scale


@pytest.mark.parametrize("remap", [False, True])
@pytest.mark.parametrize("sane", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_vector_quantizer(remap: bool, sane: bool, legacy: bool, tmp_path: Any) -> None:
    torch.manual_seed(0)
    path = None
    if remap:
        import numpy

        path = str(tmp_path / "used.npy")
        numpy.save(path, numpy.arange(0, 64, 2))
    from diffusers.models.autoencoders.vae import VectorQuantizer

    quantizer = VectorQuantizer(
        64, 4, 0.3, remap=path, unknown_index="extra", sane_index_shape=sane, legacy=legacy
    )
    nn.init.normal_(quantizer.embedding.weight)
    z = torch.randn(2, 4, 5, 6, requires_grad=True)
    weights = torch.randn(2, 4, 5, 6)

    def run() -> list[Tensor]:
        z.grad, quantizer.embedding.weight.grad = None, None
        quantized, loss, (_, _, indices) = quantizer(z)
        ((quantized * weights).sum() + loss).backward()
        return [quantized.detach(), loss.detach(), indices, z.grad, quantizer.embedding.weight.grad]

    before = run()
    swapped = accelerate(quantizer, "vq")
    assert len(swapped.swaps) == 1
    for ours, theirs in zip(run(), before, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs)


def test_amused_scheduler() -> None:
    from t2p_fast.interop.amused import AmusedScheduler

    uvit = diffusers.UVit2DModel(
        hidden_size=32, cond_embed_dim=16, encoder_hidden_size=24, vocab_size=65, codebook_size=64,
        in_channels=16, block_out_channels=16, num_res_blocks=1, num_hidden_layers=1,
        num_attention_heads=2, block_num_heads=2, intermediate_size=32, micro_cond_encode_dim=4,
        micro_cond_embed_dim=20,
    )  # fmt: skip
    pipe = diffusers.AmusedPipeline(
        vqvae=_vq_model(lookup_from_codebook=True), tokenizer=None, text_encoder=None,
        transformer=uvit.eval(),
        scheduler=diffusers.AmusedScheduler(mask_token_id=64),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    prompt = torch.randn(1, 7, 24), torch.randn(1, 16)
    swapped = accelerate(pipe)
    assert isinstance(pipe.scheduler, AmusedScheduler)
    assert {"scheduler", "group_norm", "vq", "attention"} == {swap.op for swap in swapped.swaps}
    pictures = pipe(
        prompt_embeds=prompt[1], encoder_hidden_states=prompt[0],
        negative_prompt_embeds=prompt[1], negative_encoder_hidden_states=prompt[0],
        height=8, width=8, num_inference_steps=3, output_type="np",
    ).images  # fmt: skip
    assert pictures.shape[0] == 1
    swapped.restore()
    assert type(pipe.scheduler) is diffusers.AmusedScheduler


def test_linear_attention_of_sana() -> None:
    from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel

    torch.manual_seed(0)
    model = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=8, mlp_ratio=2.0, sample_size=8, patch_size=1,
    ).eval()  # fmt: skip
    inputs = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 8), torch.tensor([3.0])
    with torch.no_grad():
        expected = model(*inputs).sample
        before = [block.attn1.processor for block in model.transformer_blocks]
        swapped = interop.accelerate(model)
        assert sorted(s.op for s in swapped.swaps) == ["attention"] * 2 + ["linear_attention"] * 2
        assert swapped.swaps[-1].path == "transformer_blocks.1.attn2.processor"
        torch.testing.assert_close(model(*inputs).sample, expected, rtol=1e-4, atol=1e-5)
        assert not interop.accelerate(model).swaps  # a second time finds nothing
        with torch.autocast("cpu", torch.bfloat16):  # the processor before does these
            assert model(*inputs).sample.isfinite().all()
        swapped.restore()
    assert [block.attn1.processor for block in model.transformer_blocks] == before


def test_only_some_ops_and_what_stays() -> None:
    torch.manual_seed(0)
    pipe = _latent_diffusion()[0]
    assert {swap.op for swap in accelerate(pipe, ["vq"]).swaps} == {"vq"}
    block = pipe.unet.mid_block.resnets[0]
    block.forward = lambda *_: torch.zeros(())
    swapped = accelerate(pipe, "group_norm")
    assert [swap.what for swap in swapped.kept] == ["its forward was replaced before"]
    swapped.restore()
    assert block(1, 2) == 0


def test_a_pipeline_is_saved_and_loaded_with_our_scheduler(tmp_path: Path) -> None:
    pipe, options = _pixel_diffusion()
    options = {**options, "num_inference_steps": 2, "output_type": "np"}
    pipe.scheduler = schedulers.DDIMScheduler.from_config(pipe.scheduler.config)
    assert isinstance(pipe.scheduler, diffusers.SchedulerMixin)
    pipe.scheduler.config.clip_sample = False
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    loaded = diffusers.DDIMPipeline.from_pretrained(tmp_path / "pipe")
    assert type(loaded.scheduler) is diffusers.DDIMScheduler
    assert not loaded.scheduler.config.clip_sample
    pictures = _draw(pipe, options), _draw(loaded, options)
    torch.testing.assert_close(*pictures, rtol=1e-3, atol=1e-3)
    accelerate(loaded)
    loaded.save_pretrained(tmp_path / "again")
    diffusers.DDIMPipeline.from_pretrained(tmp_path / "again", scheduler=pipe.scheduler)


def test_schedulers_that_would_refuse_are_kept() -> None:
    theirs = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    pipe = diffusers.DDIMPipeline(_unet(), theirs)
    swapped = accelerate(pipe, "scheduler")
    assert not swapped.swaps
    assert "without signal" in swapped.kept[0].what
    pipe = diffusers.DDPMPipeline(_unet(), diffusers.DDPMScheduler(variance_type="fixed_large"))
    pipe.scheduler.variance_type = "fixed_small"
    accelerate(pipe, "scheduler")
    assert pipe.scheduler.variance_type == "fixed_small"


def test_hooks_see_the_norms() -> None:
    torch.manual_seed(0)
    model = _unet()
    accelerate(model)
    seen: list[Tensor] = []
    norm = model.mid_block.resnets[0].norm1
    norm.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    model(torch.randn(1, 3, 16, 16), 10)
    inputs, output = seen[0]
    expected = nn.functional.group_norm(inputs, 8, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(output, expected)


def test_copies_are_independent() -> None:
    torch.manual_seed(0)
    model = _unet()
    swapped = accelerate(model)
    twin = copy.deepcopy(model)
    x = torch.randn(1, 3, 16, 16)
    nn.init.zeros_(twin.conv_norm_out.weight)
    torch.testing.assert_close(model(x, 3).sample, swapped_back(model, swapped)(x, 3).sample)
    assert twin.conv_norm_out.forward.args[0] is twin.conv_norm_out


def swapped_back(model: nn.Module, swapped: Any) -> nn.Module:
    swapped.restore()
    return model


@pytest.mark.parametrize(
    ("target", "ops", "error", "text"),
    [
        (3, "auto", TypeError, "expected a pipeline of diffusers or a model, got a int"),
        (nn.Linear(2, 2), ["norm"], ValueError, "ops='norm' is not supported; supported: 'sched"),
    ],
)
def test_errors(target: Any, ops: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        accelerate(target, ops)
