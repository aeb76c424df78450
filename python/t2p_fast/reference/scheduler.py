# SPDX-License-Identifier: Apache-2.0
"""Steps of diffusion samplers in plain PyTorch, as their papers write them.

`alpha` and `sigma` are the scales of signal and noise, `x_t = alpha x_0 + sigma e`, floats or
tensors that broadcast against the sample; `_prev` marks those of the step that follows.
"""

import math

import torch
from torch import Tensor

__all__ = [
    "scheduler_add_noise",
    "scheduler_ancestral_step",
    "scheduler_bound",
    "scheduler_ddim_step",
    "scheduler_ddpm_step",
    "scheduler_dpm_solver_step",
    "scheduler_euler_step",
    "scheduler_flow_step",
    "scheduler_guide",
    "scheduler_predict",
    "scheduler_step",
    "scheduler_velocity",
]

Scale = float | Tensor


def _tensor(value: Scale, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(len(x), math.prod(x.shape[1:]))


def scheduler_guide(
    output: Tensor, uncond_output: Tensor, scale: float, rescale: float = 0.0
) -> Tensor:
    """Classifier-free guidance (2207.12598); `rescale` is phi of 2305.08891, section 3.4."""
    guided = uncond_output + scale * (output - uncond_output)
    if rescale == 0:
        return guided
    std, wanted = _flat(guided).std(1), _flat(output).std(1)
    ratio = torch.where(std > 0, wanted / std.where(std > 0, 1), 1)
    return guided * (rescale * ratio + (1 - rescale)).view(-1, *[1] * (output.ndim - 1))


def scheduler_predict(
    sample: Tensor, output: Tensor, alpha: Scale, sigma: Scale, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """The clean sample and the noise that a network's output stands for."""
    if prediction_type == "epsilon":
        return (sample - sigma * output) / alpha, output
    if prediction_type == "sample":
        return output, (sample - alpha * output) / sigma
    if prediction_type == "v_prediction":  # 2202.00512, appendix D
        return alpha * sample - sigma * output, sigma * sample + alpha * output
    # A velocity e - x_0 on a straight path, alpha + sigma = 1 (2210.02747).
    return sample - sigma * output, sample + (1 - sigma) * output


def scheduler_bound(
    x0: Tensor, clip: float | None = None, threshold: tuple[float, float] | None = None
) -> Tensor:
    """Clipping, or dynamic thresholding (2205.11487, section 2.3), by (quantile, most)."""
    if threshold is not None:
        ratio, most = threshold
        s = _flat(x0).abs().quantile(ratio, dim=1).clamp(1, max(1.0, most)).clamp(max=most)
        s = s.view(-1, *[1] * (x0.ndim - 1))
        return torch.minimum(torch.maximum(x0, -s), s) / s
    return x0 if clip is None else x0.clamp(-clip, clip)


def scheduler_ddpm_step(
    sample: Tensor,
    output: Tensor,
    alpha: Scale,
    sigma: Scale,
    alpha_prev: Scale,
    sigma_prev: Scale,
    *,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    variance_output: Tensor | None = None,
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
    noise: Tensor | None = None,
    eps_shift: Tensor | None = None,
    mean_shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """DDPM (2006.11239, equation 7), its variance fixed or learned (2102.09672, equation 15)."""
    x0, eps = scheduler_predict(sample, output, alpha, sigma, prediction_type)
    if eps_shift is not None:
        x0 = (sample - sigma * (eps + eps_shift)) / alpha
    x0 = scheduler_bound(x0, clip, threshold)
    step = alpha**2 / _tensor(alpha_prev, sample) ** 2
    beta = 1 - step
    mean = alpha_prev * beta / sigma**2 * x0 + step.sqrt() * sigma_prev**2 / sigma**2 * sample
    small = (sigma_prev**2 / sigma**2 * beta).clamp(min=1e-20)
    if variance_type == "learned_range":
        assert variance_output is not None
        fraction = (variance_output + 1) / 2
        variance = (fraction * beta.log() + (1 - fraction) * small.log()).exp()
    elif variance_type == "learned":
        assert variance_output is not None
        variance = variance_output.exp()
    else:
        variance = small if variance_type == "fixed_small" else beta
    if mean_shift is not None:  # 2105.05233, algorithm 1
        mean = mean + variance * mean_shift
    return (mean if noise is None else mean + variance.sqrt() * noise), x0


def scheduler_ddim_step(
    sample: Tensor,
    output: Tensor,
    alpha: Scale,
    sigma: Scale,
    alpha_prev: Scale,
    sigma_prev: Scale,
    *,
    eta: float = 0.0,
    prediction_type: str = "epsilon",
    rederive: bool = False,
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
    noise: Tensor | None = None,
    eps_shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """DDIM (2010.02502, equations 12 and 16); `rederive` takes the noise from the bounded x_0."""
    x0, eps = scheduler_predict(sample, output, alpha, sigma, prediction_type)
    if eps_shift is not None:
        eps = eps + eps_shift
        x0 = (sample - sigma * eps) / alpha
    x0 = scheduler_bound(x0, clip, threshold)
    if rederive:
        eps = (sample - alpha * x0) / sigma
    ratio = _tensor(alpha, sample) / alpha_prev
    std = eta * sigma_prev / sigma * (1 - ratio**2).clamp(min=0).sqrt()
    prev = alpha_prev * x0 + (sigma_prev**2 - std**2).clamp(min=0).sqrt() * eps
    return (prev if noise is None else prev + std * noise), x0


def scheduler_dpm_solver_step(
    sample: Tensor,
    output: Tensor,
    alpha: Scale,
    sigma: Scale,
    alpha_prev: Scale,
    sigma_prev: Scale,
    *,
    history: Tensor | None = None,
    alpha_before: Scale = 1.0,
    sigma_before: Scale = 0.0,
    prediction_type: str = "epsilon",
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """DPM-Solver++ 2M (2211.01095, algorithm 2); of first order without the `x_0` before."""
    x0, _ = scheduler_predict(sample, output, alpha, sigma, prediction_type)
    x0 = scheduler_bound(x0, clip, threshold)
    ratio = _tensor(sigma_prev, sample) / sigma
    decay = ratio * alpha / alpha_prev  # exp(-h), h the step in log SNR / 2
    d = x0
    if history is not None:
        h = -decay.log()
        h_before = (_tensor(alpha, sample) / sigma * sigma_before / alpha_before).log()
        d = x0 + (x0 - history) * h / (2 * h_before)
    return ratio * sample + alpha_prev * (1 - decay) * d, x0


def scheduler_euler_step(
    sample: Tensor,
    output: Tensor,
    sigma: Scale,
    sigma_prev: Scale,
    *,
    prediction_type: str = "epsilon",
    noise: Tensor | None = None,
    churn: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Euler's step of Karras et al. (2206.00364, algorithm 2), `x = x_0 + sigma e`.

    `churn` is gamma: the noise level is first raised to `(1 + gamma) sigma` with `noise`.
    """
    raised = sigma * (1 + churn)
    if noise is not None:
        sample = sample + (raised**2 - sigma**2) ** 0.5 * noise
    x0 = _predict_exploding(sample, output, raised, prediction_type)
    return sample + (sample - x0) / raised * (sigma_prev - raised), x0


def _predict_exploding(
    sample: Tensor, output: Tensor, sigma: Scale, prediction_type: str
) -> Tensor:
    alpha = 1 / (1 + _tensor(sigma, sample) ** 2).sqrt()  # the network saw alpha * sample
    return scheduler_predict(alpha * sample, output, alpha, alpha * sigma, prediction_type)[0]


def scheduler_ancestral_step(
    sample: Tensor,
    output: Tensor,
    sigma: Scale,
    sigma_prev: Scale,
    *,
    prediction_type: str = "epsilon",
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Euler's step down to less noise than asked for, and fresh noise up again (k-diffusion)."""
    x0 = _predict_exploding(sample, output, sigma, prediction_type)
    up = (sigma_prev**2 * (sigma**2 - sigma_prev**2) / sigma**2) ** 0.5
    down = (sigma_prev**2 - up**2) ** 0.5
    prev = sample + (sample - x0) / sigma * (down - sigma)
    return (prev if noise is None else prev + up * noise), x0


def scheduler_flow_step(
    sample: Tensor,
    output: Tensor,
    sigma: Scale,
    sigma_prev: Scale,
    *,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Euler's step on a straight path (2210.02747); with `noise`, from `x_0` with new noise."""
    x0 = sample - sigma * output
    if noise is not None:
        return (1 - sigma_prev) * x0 + sigma_prev * noise, x0
    return sample + (sigma_prev - sigma) * output, x0


def scheduler_add_noise(sample: Tensor, noise: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
    """`alpha x_0 + sigma e`: a sample of the forward process."""
    return alpha * sample + sigma * noise


def scheduler_velocity(sample: Tensor, noise: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
    """`alpha e - sigma x_0`: what a network that predicts v learns (2202.00512, appendix D)."""
    return alpha * noise - sigma * sample


def scheduler_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    *,
    uncond_output: Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
    learned_variance: bool = False,
    shift: Tensor | None = None,
    history: tuple[Tensor, ...] = (),
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step from its coefficients, `[b, 16]`: what `ops.scheduler_step` computes."""
    c = [v.view(-1, *[1] * (sample.ndim - 1)) for v in coefficients.to(sample).unbind(1)]
    output, variance = model_output, torch.zeros_like(sample)
    if learned_variance:
        output, raw = model_output.chunk(2, 1)
        variance = (c[10] + c[11] * raw).exp()
        noise = None if noise is None else variance.sqrt() * noise
        if uncond_output is not None and uncond_output.shape != output.shape:
            uncond_output = uncond_output.chunk(2, 1)[0]
    if uncond_output is not None:
        output = scheduler_guide(output, uncond_output, guidance_scale, guidance_rescale)
    x0 = c[0] * sample + c[1] * output
    rest = c[4] * sample + c[5] * output
    if shift is not None:
        x0 = x0 + c[2] * shift
        rest = rest + (c[7] + c[12] * variance) * shift
    if noise is not None:
        x0, rest = x0 + c[3] * noise, rest + c[13] * noise
    for weight, before in zip(c[8:10], history, strict=False):
        rest = rest + weight * before
    if clip is None and threshold is None:
        return rest, x0
    x0 = scheduler_bound(x0, clip, threshold)
    return rest + c[6] * x0, x0
