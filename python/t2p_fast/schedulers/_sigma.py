# SPDX-License-Identifier: Apache-2.0
"""What the schedulers share that count their steps and know noise levels rather than timesteps."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from t2p_fast.ops.scheduler import DRAWN_NOISE, NO_NOISE, NoiseSource, run_step
from t2p_fast.schedulers._base import UNBOUNDED, Scheduler, find_table, version_of

__all__ = ["SigmaScheduler"]

Array = NDArray[np.float64]


class SigmaScheduler(Scheduler):
    """A scheduler with `sigmas`, one more than it has timesteps.

    The step is counted from the first timestep that it is given, or from `set_begin_index`, as in
    diffusers; a schedule may visit a timestep twice.
    """

    # Whether a timestep that occurs twice means its second place, and one that does not the last.
    lenient: ClassVar[bool] = False

    sigmas: Tensor
    _coefficients: Callable[..., Tensor]
    _step_index: int | None = None
    _begin_index: int | None = None

    @property
    def step_index(self) -> int | None:
        """The number of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The number of the first step, where a pipeline has set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sets the number of the first step, which then need not be found by its timestep."""
        self._begin_index = begin_index

    def _set_sigmas(
        self, sigmas: Array, timesteps: Tensor, device: torch.device | str | None
    ) -> None:
        """Takes levels in float64 with those of the result at their end, and the timesteps."""
        self._levels = torch.from_numpy(np.ascontiguousarray(sigmas, dtype=np.float64))
        self.sigmas = self._levels.float()
        self._given_sigmas, self._sigmas_version = self.sigmas, version_of(self.sigmas)
        self._step_index = self._begin_index = None
        self._set_schedule(timesteps, device)

    def _float64_sigmas(self) -> Tensor:
        """The levels; those that somebody has put into `sigmas` where that was changed."""
        if self.config.changed:
            self._look_at_config()
        sigmas = self.sigmas
        if sigmas is not self._given_sigmas or not (
            torch.compiler.is_compiling() or version_of(sigmas) == self._sigmas_version
        ):
            self._given_sigmas, self._sigmas_version = sigmas, version_of(sigmas)
            levels = sigmas.double().cpu()
            same = self._levels.float().double()  # as those of a copy are
            if torch.compiler.is_compiling() or not torch.equal(levels, same):
                self._levels = levels
                self._schedule.clear()
        return self._levels

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """The number of the step at a timestep: of two equal ones the second.

        Raises:
            ValueError: No step has it.
        """
        schedule = self._schedule
        if schedule_timesteps is None and not schedule.holds(self.timesteps):
            schedule_timesteps = self.timesteps  # somebody has changed them
        if schedule_timesteps is None:
            values, wanted = schedule.values, schedule.value(timestep, self.timesteps)
        else:
            values, wanted = schedule_timesteps.tolist(), None
        if wanted is None:
            wanted = float(timestep)
        found = [i for i, value in enumerate(values) if value == wanted]
        if not found:
            if self.lenient:
                return len(values) - 1
            raise ValueError(
                f"{type(self).__name__}: timestep {wanted} is not one of its timesteps"
            )
        return found[min(1, len(found) - 1)]

    def _init_step_index(self, timestep: Any) -> None:
        begin = self._begin_index
        self._step_index = self.index_for_timestep(timestep) if begin is None else begin

    def _this_step(self, timestep: Any) -> int:
        """The number of the step to do; who has done it counts on."""
        if self._step_index is None:
            self._init_step_index(timestep)
        step = self._step_index
        assert step is not None
        steps = len(self._levels) - 1
        if step >= steps:
            raise ValueError(
                f"{type(self).__name__}.step: all {steps} steps are done; call set_timesteps to "
                "begin again"
            )
        return step

    def _run_step(
        self, key: tuple[Any, ...], step: int, sample: Tensor, model_output: Tensor,
        uncond_output: Tensor | None, guidance_scale: float, guidance_rescale: float,
        noise: NoiseSource, bounds: tuple[int, float, float] = UNBOUNDED,
        history1: Tensor | None = None, history2: Tensor | None = None,
        *, returns_x0: bool = True,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Previous and clean sample of a step, with the coefficients that belong to `key`."""
        schedule, drawn = self._schedule, noise is DRAWN_NOISE
        can_plan = drawn or noise is NO_NOISE
        if can_plan:
            planned = schedule.planned(
                (key, drawn), step, sample, model_output, uncond_output, guidance_scale,
                guidance_rescale, history1, history2,
            )  # fmt: skip
            if planned is not None:
                self._step_index = step + 1
                return planned
        table = find_table(schedule.tables, key, sample, self._coefficients)
        if can_plan:
            noisy = range(len(table) if drawn else 0)
            schedule.plan((key, drawn), table, noisy, bounds, returns_x0=returns_x0)
        prev, x0 = run_step(
            sample, model_output, table, step, None, uncond_output, guidance_scale,
            guidance_rescale, bounds, False, None, history1, history2, noise, returns_x0,
        )  # fmt: skip
        self._step_index = step + 1
        return prev, x0

    def _refuse_integer(self, timestep: Any) -> None:
        is_integer = isinstance(timestep, int) or (
            isinstance(timestep, Tensor) and timestep.dtype in (torch.int32, torch.int64)
        )
        if is_integer:
            raise ValueError(
                f"Passing integer indices (e.g. from `enumerate(timesteps)`) as timesteps to "
                f"`{type(self).__name__}.step()` is not supported. Make sure to pass one of the "
                "`scheduler.timesteps` as a timestep."
            )

    def _steps_of(self, timesteps: Tensor | Sequence[float]) -> Tensor | int:
        """The step of each timestep, found where the timesteps are."""
        if self._begin_index is not None:
            return self._begin_index if self._step_index is None else self._step_index
        given = torch.as_tensor(timesteps).flatten()
        schedule = self.timesteps.to(given.device)
        equal = schedule[None] == given[:, None].to(schedule.dtype)
        first = equal.int().argmax(1)
        others = equal.scatter(1, first[:, None], False)
        found = torch.where(others.any(1), others.int().argmax(1), first)
        missing = len(schedule) - 1 if self.lenient else -1  # -1 raises, or gives NaN on a GPU
        return torch.where(equal.any(1), found, missing)

    def _mix_at(
        self, name: str, sample: Tensor, noise: Tensor, timesteps: Tensor, scales: Any
    ) -> Tensor:
        self._float64_sigmas()
        tables = self._schedule.tables
        return self._mix(tables, name, sample, noise, scales, self._steps_of(timesteps))
