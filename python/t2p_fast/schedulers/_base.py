# SPDX-License-Identifier: Apache-2.0
"""What the schedulers share: their result, their noise, and the road to the kernel."""

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from t2p_fast._checks import has_modes
from t2p_fast.ops.scheduler import DRAWN_NOISE, NoiseSource, SchedulerPlan, run_step
from t2p_fast.ops.scheduler_autograd import CLIP, NO_BOUND, THRESHOLD
from t2p_fast.ops.scheduler_coefficients import mix_coefficients
from t2p_fast.schedulers._config import Configurable, on_host

__all__ = [
    "UNBOUNDED",
    "Generator",
    "Scheduler",
    "SchedulerOutput",
    "Tables",
    "draw_noise",
    "find_table",
    "randn",
    "version_of",
]

# Coefficients by what they depend on, and the sample's device and dtype.
Tables = dict[tuple[tuple[Any, ...], int, torch.dtype], Tensor]

UNBOUNDED = (NO_BOUND, 1.0, 0.0)  # how x0 is bounded: kind, limit and quantile

Generator = torch.Generator | list[torch.Generator] | None


class SchedulerOutput:
    """The result of a step.

    Attributes:
        prev_sample: The sample of the timestep that follows.
        pred_original_sample: The clean sample that the step predicted, bounded as configured; None
            where the scheduler has none.

    It can also be taken for a dict or, by number and in unpacking, for the tuple of its entries.
    """

    __slots__ = ("pred_original_sample", "prev_sample")

    def __init__(self, prev_sample: Tensor, pred_original_sample: Tensor | None = None) -> None:
        self.prev_sample = prev_sample
        self.pred_original_sample = pred_original_sample

    def to_tuple(self) -> tuple[Tensor, ...]:
        """The entries that are there."""
        if self.pred_original_sample is None:
            return (self.prev_sample,)
        return self.prev_sample, self.pred_original_sample

    def keys(self) -> tuple[str, ...]:
        """The names of the entries."""
        return ("prev_sample", "pred_original_sample")[: len(self.to_tuple())]

    def values(self) -> tuple[Tensor, ...]:
        """The entries."""
        return self.to_tuple()

    def items(self) -> list[tuple[str, Tensor]]:
        """Names and entries."""
        return list(zip(self.keys(), self.to_tuple(), strict=True))

    def __getitem__(self, key: str | int | slice) -> Any:
        return dict(self.items())[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.to_tuple())

    def __repr__(self) -> str:
        entries = ", ".join(f"{name}={value!r}" for name, value in self.items())
        return f"{type(self).__name__}({entries})"


def randn(
    shape: Sequence[int], generator: Generator, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """torch's noise from one generator, or from one for each sample; on the generator's device."""
    if isinstance(generator, list):
        if len(generator) == 1:
            return randn(shape, generator[0], device, dtype)
        if len(generator) != shape[0]:
            raise ValueError(f"there are {len(generator)} generators for a batch of {shape[0]}")
        return torch.cat([randn((1, *shape[1:]), g, device, dtype) for g in generator])
    source = device if generator is None else generator.device
    if source.type != device.type and source.type != "cpu":
        raise ValueError(f"a generator on {source} cannot make noise for a tensor on {device}")
    if source.type == device.type:
        source = device
    return torch.randn(list(shape), generator=generator, device=source, dtype=dtype).to(device)


_is_compiling = torch.compiler.is_compiling
_get_num_threads = torch.get_num_threads


def draw_noise(
    like: Tensor, generator: Generator, noise: Tensor | None, dtype: torch.dtype | None = None
) -> NoiseSource:
    """What the kernel needs for noise.

    With a generator the noise is that of `torch.randn` in `dtype`, if not given that of `like`, as
    in diffusers. Without one the kernel draws, from a seed out of torch's default generator:
    torch.manual_seed makes it repeatable.
    """
    if noise is None and generator is None:
        return DRAWN_NOISE
    if noise is None:
        noise = randn(like.shape, generator, like.device, dtype or like.dtype).to(like.dtype)
    elif generator is not None:
        raise ValueError("pass either generator or variance_noise, not both")
    return noise.to(like.device), False, None, 0, 0


def find_table(
    tables: Tables, key: tuple[Any, ...], sample: Tensor, make: Callable[..., Tensor]
) -> Tensor:
    """The coefficients that belong to `key`, where the sample is and in the kernel's dtype.

    Made as `make(*key)`, and added to `tables`, where there are none yet.
    """
    place = (key, sample.get_device(), sample.dtype)
    table, compiling = tables.get(place), torch.compiler.is_dynamo_compiling()
    # What compiled code has made in inference mode is of use there alone.
    if table is not None and (compiling or not table.is_inference()):
        return table
    dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
    device = torch.device("cpu") if sample.is_meta else sample.device
    if compiling:
        table = tables[place] = make(*key).to(device=device, dtype=dtype)
        return table
    # A mode would make it something that is of no use without it.
    with on_host(), _disable_current_modes(), temporarily_clear_interpreter_stack():
        table = tables[place] = make(*key).to(device=device, dtype=dtype)
    return table


def version_of(tensor: Tensor) -> int | None:
    """How often something was written there; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version


class Schedule:
    """The timesteps of a scheduler, and the tables that were made for them.

    Apart from the scheduler, whose every attribute takes Python longer: it has a `__getattr__`.

    Args:
        timesteps: `[n]`, where the scheduler has them.
        values: The same numbers on the host.
    """

    __slots__ = ("_bytes", "_first", "_version", "plans", "tables", "timesteps", "values")

    def __init__(self, timesteps: Tensor, values: list[Any]) -> None:
        self.timesteps, self.values = timesteps, values
        self.tables: Tables = {}
        self.plans: dict[Any, SchedulerPlan] = {}
        self._first, self._bytes = timesteps.data_ptr(), timesteps.element_size()
        self._version = version_of(timesteps)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy lies elsewhere, and does not know that somebody has written into the original.
        values = self.values if self.holds(self.timesteps) else self.timesteps.tolist()
        return Schedule, (self.timesteps, values)

    def clear(self) -> None:
        """Forgets what was made."""
        self.tables.clear()
        self.plans.clear()

    def plan(
        self, key: Any, table: Tensor, noisy: range, bounds: tuple[int, float, float] = UNBOUNDED,
        learned: bool = False, *, by_timestep: bool = False, returns_x0: bool = True,
    ) -> None:  # fmt: skip
        """Notes how steps with the options `key` go, for plain CPU tensors to take less long.

        The rows of `table` that are in `noisy` draw noise. With `by_timestep` they are the
        timesteps.
        """
        if key in self.plans or _is_compiling() or has_modes():
            return
        if table.is_cuda or table.dtype != torch.float32:
            return
        timesteps, rows = None, []
        if by_timestep:
            timesteps = self.timesteps
            if timesteps.device.type != "cpu" or not self._first:  # or without memory
                return
            rows = [-1 if value is None else value for value in self.values]
        self.plans[key] = SchedulerPlan(
            timesteps, rows, table, *bounds, learned, noisy.start, noisy.stop, returns_x0
        )

    def planned(
        self, key: Any, place: Any, sample: Tensor, model_output: Tensor,
        uncond_output: Tensor | None, guidance_scale: float, guidance_rescale: float,
        history1: Tensor | None = None, history2: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None] | None:  # fmt: skip
        """Previous and clean sample of a step that goes as planned, or None.

        `place` is the step's row, or its timestep where the plan is by timestep.
        """
        plan = self.plans.get(key)
        if plan is None or _is_compiling():
            return None
        return plan.step(
            sample, model_output, place, uncond_output, guidance_scale, guidance_rescale,
            history1, history2, _get_num_threads(),
        )  # fmt: skip

    def holds(self, timesteps: Tensor) -> bool:
        """Whether these are its timesteps still, and nobody has written others there."""
        if timesteps is not self.timesteps:
            return False
        return _is_compiling() or self._version == version_of(timesteps)

    def value(self, timestep: Any, timesteps: Tensor) -> Any:
        """The number that a tensor is, if it is one of the timesteps, without reading it; or None.

        Loops go over the scheduler's `timesteps`, which may be on a GPU. To read one there would be
        to wait for everything launched before, and its value is known; unless somebody has put
        others there.
        """
        if _is_compiling() or not self.holds(timesteps):
            return None
        if not isinstance(timestep, Tensor) or timestep.numel() != 1:
            return None
        try:
            place = (timestep.data_ptr() - self._first) // self._bytes
        except RuntimeError:  # a tensor without memory
            return None
        return self.values[place] if 0 <= place < len(self.values) else None


# Where a pipeline of diffusers that is saved looks for the class to load: it may be its own, of the
# same name, where this package is not installed.
THEIR_MODULE = "diffusers.schedulers"


def _join_diffusers() -> None:
    """Makes schedulers instances of diffusers' base class, if diffusers has been imported.

    Its pipelines save and take no others. All that the class does is overridden.
    """
    theirs = getattr(sys.modules.get(f"{THEIR_MODULE}.scheduling_utils"), "SchedulerMixin", None)
    if theirs is not None and theirs not in Scheduler.__bases__:
        # Somebody may have derived a class from both already.
        with suppress(TypeError):
            Scheduler.__bases__ = (*Scheduler.__bases__, theirs)


class Scheduler(Configurable):
    """The base of all schedulers.

    A subclass makes coefficients, a table `[t, 16]` in float64 with a row per step, and calls
    `run_step` with the row. Tables are made once and kept, by what they depend on and by device.
    """

    order: ClassVar[int] = 1
    compatible_names: ClassVar[tuple[str, ...]] = (
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
    )

    timesteps: Tensor
    num_inference_steps: int | None = None
    _constants: Tables  # for any schedule, where there are any

    def __new__(cls, *_args: Any, **_kwargs: Any) -> "Scheduler":
        _join_diffusers()
        scheduler = super().__new__(cls)
        if cls.__module__.startswith(__package__):  # and is no user's own
            scheduler.__module__ = THEIR_MODULE
        return scheduler

    def __copy__(self) -> "Scheduler":
        """Shares tensors with the original, but neither tables nor the configuration."""
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        make, arguments = self._schedule.__reduce__()
        copied._schedule = make(*arguments)
        copied._internal_dict = copy.deepcopy(self.config)
        if "_constants" in self.__dict__:
            copied._constants = {}
        return copied

    def _set_schedule(self, timesteps: Tensor, device: torch.device | str | None) -> None:
        """Takes timesteps on the host as the schedule, and drops what was made for another."""
        self.timesteps = timesteps.to(device).contiguous()
        self._schedule = Schedule(self.timesteps, timesteps.tolist())

    def register_to_config(self, **entries: Any) -> None:
        """Adds entries to the configuration, or replaces them; what was made from it is dropped."""
        super().register_to_config(**entries)
        if "_schedule" in self.__dict__:
            self._look_at_config()

    def _look_at_config(self) -> None:
        """Drops what was made from another configuration."""
        self._schedule.clear()
        self.config.changed = False

    @property
    def compatibles(self) -> list[type["Scheduler"]]:
        """The schedulers that understand this one's configuration."""
        from t2p_fast import schedulers

        return [getattr(schedulers, name) for name in self.compatible_names]

    def __len__(self) -> int:
        length: int = self.config.num_train_timesteps
        return length

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The sample as the network wants it: here as it is."""
        return sample

    def _bound(self) -> tuple[int, float, float]:
        """How `x0` is bounded: kind, limit and quantile."""
        config = self.config
        if config.thresholding:
            return THRESHOLD, float(config.sample_max_value), config.dynamic_thresholding_ratio
        if config.get("clip_sample", False):
            return CLIP, float(config.clip_sample_range), 0.0
        return UNBOUNDED

    def _mix(
        self, tables: Tables, name: str, sample: Tensor, other: Tensor,
        make: Callable[[], tuple[Tensor, Tensor]], index: Tensor | int,
    ) -> Tensor:  # fmt: skip
        """`a[index] sample + b[index] other`, an index for each sample."""
        sample, other = torch.broadcast_tensors(sample, other)
        if sample.is_complex() or not sample.is_floating_point():
            raise TypeError(f"samples must be of floating point, got {sample.dtype}")
        table = find_table(tables, (name,), sample, lambda _: mix_coefficients(*make()))
        row, each = 0, None
        if isinstance(index, int):
            row = index
        else:
            each = index.to(device=sample.device, dtype=torch.int64).flatten()
            each = each.expand(len(sample)) if len(each) == 1 else each
        return run_step(sample, other, table, row, each, return_x0=False)[0]
