# SPDX-License-Identifier: Apache-2.0
"""diffusers' scheduler of masked decoding, with its step in one pass over the logits."""

from typing import Any

import torch
from diffusers.schedulers.scheduling_amused import AmusedScheduler as _AmusedScheduler
from diffusers.schedulers.scheduling_amused import AmusedSchedulerOutput
from torch import Tensor

from t2p_fast.ops import masked_sample
from t2p_fast.schedulers._base import THEIR_MODULE

__all__ = ["AmusedScheduler"]


class AmusedScheduler(_AmusedScheduler):  # type: ignore[misc]
    """`diffusers.AmusedScheduler` with a faster `step`::

        pipeline.scheduler = AmusedScheduler.from_config(pipeline.scheduler.config)

    Draws follow the same distribution and as many tokens are masked again, but a generator's seed
    means other tokens. A picture's tokens depend on its place in the batch, as there.
    """

    def __new__(cls, *_args: Any, **_kwargs: Any) -> "AmusedScheduler":
        scheduler: AmusedScheduler = super().__new__(cls)
        if cls is AmusedScheduler:  # and no user's own
            scheduler.__module__ = THEIR_MODULE
        return scheduler

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        starting_mask_ratio: float = 1.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One round of decoding.

        Args:
            model_output: ``[b, n, v]`` logits, or ``[b, v, h, w]`` where `sample` is
                ``[b, h, w]``; float32, bfloat16 or float16.
            timestep: of `timesteps`; 0 is the last, which masks nothing.
            sample: tokens, int64.
            starting_mask_ratio: share of the positions that were masked at the start.
            generator: where the noise's seeds are drawn from.
            return_dict: whether to return an `AmusedSchedulerOutput` or a tuple.

        Returns:
            The tokens after masking again, and before.
        """
        shape, logits, tokens = sample.shape, model_output, sample
        if sample.ndim == 3 and model_output.ndim == 4:
            logits = model_output.permute(0, 2, 3, 1).flatten(1, 2)
            tokens = sample.flatten(1)
        place = None if generator is None else generator.device
        seed = torch.randint(2**63 - 1, (len(tokens),), generator=generator, device=place)
        count, temperature = None, 0.0
        if timestep != 0:
            if self.timesteps is None:
                raise ValueError("AmusedScheduler.step: call set_timesteps first")
            steps = len(self.timesteps)
            if not 0 <= timestep < steps:
                raise ValueError(
                    f"AmusedScheduler.step: timestep is {int(timestep)}, expected 0 to {steps - 1}"
                )
            count = self._count(tokens, (steps - int(timestep)) / steps, starting_mask_ratio)
            temperature = float(self.temperatures[steps - 1 - int(timestep)])
        result = masked_sample(
            logits,
            tokens,
            mask_token=self.config.mask_token_id,
            mask_count=count,
            choice_temperature=max(temperature, 0.0),
            seed=seed.to(tokens.device),
        )
        masked, drawn = result.tokens.view(shape), result.sampled.view(shape)
        return AmusedSchedulerOutput(masked, drawn) if return_dict else (masked, drawn)

    def _count(self, tokens: Tensor, ratio: float, starting_mask_ratio: float) -> Tensor:
        """How many positions to mask again, rounded as there: in float32."""
        share = torch.tensor(ratio)
        schedule = self.config.masking_schedule
        if schedule == "cosine":
            share = torch.cos(share * torch.pi / 2)
        elif schedule == "linear":
            share = 1 - share
        else:
            raise ValueError(f"AmusedScheduler: masking_schedule {schedule!r} is not known")
        count = (tokens.shape[1] * (starting_mask_ratio * share)).floor().long()
        unknown = (tokens == self.config.mask_token_id).sum(1)
        return torch.minimum(count.to(unknown.device), unknown - 1).clamp_min(1)
