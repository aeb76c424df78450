# SPDX-License-Identifier: Apache-2.0
"""The training loop: resumable to the bit, checkpointed atomically, on accelerate.

Everything random in step ``s`` on process ``r`` follows from ``(seed, s, r)``, and batch ``s``
from its indices. So a checkpoint is a step number and tensors, and a resumed run ends in the same
weights as one that was never interrupted.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from t2p_fast.checkpoints import (
    CheckpointError,
    check_finite,
    read_safetensors,
    write_atomically,
    write_safetensors,
)
from t2p_fast.training.config import RunConfig

STATE_NAME = "state.safetensors"
METRICS_NAME = "metrics.csv"


class DivergedError(FloatingPointError):
    """Training has led to NaN or infinity; the message names the step and the quantity."""


class Task(ABC):
    """What is trained: data, modules, one step, and what to save of it."""

    run: RunConfig
    dataset: Dataset[Any]
    # Modules with parameters to learn, by name; each gets its own optimiser.
    modules: dict[str, nn.Module]
    # The module of which a moving average is kept.
    averaged: str

    @abstractmethod
    def collate(self, samples: list[Any]) -> Any:
        """Samples of the dataset to a batch."""

    @abstractmethod
    def step(self, batch: Any, step: int, trainer: Trainer) -> dict[str, Tensor]:
        """One optimiser step; returns what to log, as scalar tensors."""

    @abstractmethod
    def save_pretrained(self, module: nn.Module, folder: Path) -> None:
        """Writes the finished model, given the averaged module."""

    @abstractmethod
    def sample_sheet(self, module: nn.Module, path: Path) -> None:
        """Draws what the averaged module can do so far."""

    def describe(self) -> dict[str, Any]:
        """The configuration, as it is kept in checkpoints."""
        return dataclasses.asdict(self.config)  # type: ignore[attr-defined]


class Trainer:
    """Runs a :class:`Task` into a folder.

    The folder holds ``state.safetensors`` (the whole state, replaced atomically), ``metrics.csv``,
    TensorBoard events if TensorBoard is installed, ``samples/*.png`` and, at the end, the model.

    Args:
        task: what to train.
        out: the folder; an unfinished run of the same configuration in it is continued.
        cpu: keep to the CPU even if there is an accelerator.
        report: called with one line of text per ``log_every`` steps.
        on_step: called after every step, once for each that a resumed run already has.

    Attributes:
        saved_step: the step of the state in the folder; 0 if there is none.
    """

    def __init__(
        self,
        task: Task,
        out: str | Path,
        *,
        cpu: bool = False,
        report: Callable[[str], None] = print,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.task = task
        self.run = task.run
        self.out = Path(out)
        self.report = report
        self.on_step = on_step
        self.saved_step = 0
        self.accelerator = Accelerator(mixed_precision=self.run.mixed_precision, cpu=cpu)
        self.optimizers = {
            name: torch.optim.AdamW(
                [p for p in module.parameters() if p.requires_grad],
                lr=self.run.learning_rate,
                betas=self.run.betas,
                weight_decay=self.run.weight_decay,
                fused=True,
            )
            for name, module in task.modules.items()
        }
        for name in task.modules:
            task.modules[name], self.optimizers[name] = self.accelerator.prepare(
                task.modules[name], self.optimizers[name]
            )
        self.average: dict[str, Tensor] | None = None
        if self.run.ema_decay > 0:
            source = self.unwrap(task.averaged).state_dict()
            self.average = {k: v.detach().clone() for k, v in source.items()}

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    def unwrap(self, name: str) -> nn.Module:
        """The module itself, without the wrappers of mixed precision and DDP."""
        module: nn.Module = self.accelerator.unwrap_model(
            self.task.modules[name], keep_fp32_wrapper=False
        )
        return module

    def optimize(self, name: str, loss: Tensor) -> None:
        """Backward, clipping and one step of the optimiser of module ``name``."""
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        if self.run.gradient_clip > 0:
            self.accelerator.clip_grad_norm_(
                self.task.modules[name].parameters(), self.run.gradient_clip
            )
        optimizer.step()

    def train(self, *, stop_at: int | None = None) -> Path:
        """Trains to the last step (or to ``stop_at``, as an interruption would) and saves.

        Returns:
            The folder of the finished model.

        Raises:
            DivergedError: when a metric or a weight is not finite; the state saved last stays.
            CheckpointError: if the state in the folder is damaged or of another configuration.
        """
        start = self._resume()
        self.out.mkdir(parents=True, exist_ok=True)
        end = min(self.run.steps, self.run.steps if stop_at is None else stop_at)
        log = _MetricsLog(self.out, start) if self.accelerator.is_main_process else None
        for _ in range(start):
            self.on_step()
        clock, clock_step = time.perf_counter(), start
        batches = iter(self._loader(start, end))
        for step in range(start, end):
            batch = next(batches)
            if isinstance(batch, Exception):
                try:
                    raise batch
                finally:
                    del batch  # or it and this frame keep each other, and the workers, alive
            self._seed(step)
            for optimizer in self.optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, self.run)
            values = self._means(self.task.step(batch, step, self))
            done = step + 1
            for name, value in values.items():
                if not math.isfinite(value):
                    raise self._diverged(done, f"{name} is {value}")
            self._update_average(step)
            self.on_step()
            if done % self.run.log_every == 0 or done == end:
                now = time.perf_counter()
                pictures = (done - clock_step) * self.run.batch_size
                pictures *= self.accelerator.num_processes
                values["pictures_per_second"] = pictures / (now - clock)
                clock, clock_step = now, done
                if log is not None:
                    log.write(done, values)
                    shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
                    self.report(f"step {done}/{self.run.steps}  {shown}")
            # Saved before the sheet is drawn: a failing sheet costs no work.
            if done % self.run.save_every == 0 or done == end:
                self._save(done)
            if done % self.run.sample_every == 0 or done == self.run.steps:
                self._sample_sheet(done)
        if log is not None:
            log.close()
        folder = self.out / "model"
        if end == self.run.steps and self.accelerator.is_main_process:
            with self._averaged_weights() as module:
                self.task.save_pretrained(module, folder)
        self.accelerator.wait_for_everyone()
        return folder

    def _loader(self, start: int, end: int) -> DataLoader[Any]:
        return DataLoader(
            _Batches(self.task),
            sampler=StepBatches(
                start,
                end,
                self.run.batch_size,
                self.accelerator.process_index,
                self.accelerator.num_processes,
                len(self.task.dataset),  # type: ignore[arg-type]
                self.run.seed,
            ),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.run.num_workers,
            persistent_workers=self.run.num_workers > 0,
        )

    def _seed(self, step: int) -> None:
        process = self.accelerator.process_index
        torch.manual_seed((self.run.seed * 1_000_003 + step) * 4099 + process + (1 << 40))

    def _means(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Metrics as numbers, averaged over the processes."""
        row = torch.stack([value.detach().float().reshape(()) for value in metrics.values()])
        means = self.accelerator.gather(row[None]).mean(0)
        return dict(zip(metrics, means.tolist(), strict=True))

    def _diverged(self, step: int, what: str) -> DivergedError:
        kept = f"the state of step {self.saved_step} is kept" if self.saved_step else "none is kept"
        return DivergedError(
            f"{self.out}: training diverged at step {step}: {what}; {kept}; a lower "
            "run.learning_rate may help"
        )

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        if self.average is None:
            return
        # The early average forgets faster, so that it is not tied to the initial weights.
        decay = min(self.run.ema_decay, (1 + step) / (10 + step))
        for key, value in self.unwrap(self.task.averaged).state_dict().items():
            if value.is_floating_point():
                self.average[key].lerp_(value, 1 - decay)
            else:
                self.average[key].copy_(value)

    def _averaged_weights(self) -> _Swapped:
        return _Swapped(self.unwrap(self.task.averaged), self.average)

    def _sample_sheet(self, step: int) -> None:
        if not self.accelerator.is_main_process:
            return
        folder = self.out / "samples"
        folder.mkdir(exist_ok=True)
        with self._averaged_weights() as module, torch.random.fork_rng(devices=[]):
            self.task.sample_sheet(module, folder / f"{step:07d}.png")

    def _save(self, step: int) -> None:
        if not self.accelerator.is_main_process:
            return
        tensors: dict[str, Tensor] = {}
        for name in self.task.modules:
            module = self.unwrap(name)
            tensors |= {f"module/{name}/{k}": v for k, v in module.state_dict().items()}
            for index, state in self.optimizers[name].state_dict()["state"].items():
                tensors |= {f"optimizer/{name}/{index}/{k}": v for k, v in state.items()}
        if self.average is not None:
            tensors |= {f"average/{k}": v for k, v in self.average.items()}
        try:
            check_finite("", tensors)
        except CheckpointError as error:
            raise self._diverged(step, str(error)) from None
        description = json.dumps(self.task.describe())
        # safetensors refuses tensors that share memory (tied weights); copies do not.
        tensors = {k: v.detach().clone() for k, v in tensors.items()}
        write_safetensors(
            self.out / STATE_NAME, tensors, {"step": str(step), "config": description}
        )
        self.saved_step = step

    def _resume(self) -> int:
        path = self.out / STATE_NAME
        if not path.exists():
            return 0
        step, described = _read_metadata(path)
        mine = json.loads(json.dumps(self.task.describe()))
        for section in mine:
            # Only the run's length and pace may change when a run is continued.
            if section != "run" and mine[section] != described.get(section):
                raise CheckpointError(
                    f"{path}: is of another configuration: its {section} is "
                    f"{described.get(section)}, expected {mine[section]}"
                )
        if step > self.run.steps:
            raise CheckpointError(
                f"{path}: is of step {step}, beyond run.steps, {self.run.steps}; expected at least "
                f"run.steps={step} to go on, or another folder"
            )
        tensors = read_safetensors(path, self.device)
        check_finite(f"{path}: ", tensors)
        groups: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            group, _, rest = key.partition("/")
            if group != "average":
                name, _, rest = rest.partition("/")
                group = f"{group}/{name}"
            groups.setdefault(group, {})[rest] = value
        try:
            for name in self.task.modules:
                self.unwrap(name).load_state_dict(groups[f"module/{name}"])
                state: dict[int, dict[str, Tensor]] = {}
                for key, value in groups.get(f"optimizer/{name}", {}).items():
                    index, _, what = key.partition("/")
                    # Only `step` lives on the CPU, where the fused optimiser wants it.
                    state.setdefault(int(index), {})[what] = value
                optimizer = self.optimizers[name]
                optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
            if self.average is not None:
                self.average = {k: groups["average"][k] for k in self.average}
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path}: does not fit this configuration ({error})") from error
        self.saved_step = step
        return step


class _Batches(Dataset[Any]):
    """The batches of a task by their indices; an error comes as a value.

    A worker process would wrap it in the text of its traceback.
    """

    def __init__(self, task: Task) -> None:
        self.task = task

    def __getitem__(self, indices: Any) -> Any:
        try:
            return self.task.collate([self.task.dataset[i] for i in indices])
        except (OSError, ValueError) as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


class StepBatches(Sampler[list[int]]):
    """Indices of the batches of steps ``start`` to ``end`` on one process.

    A finite dataset is gone through in a new order each epoch, which follows from the seed.
    """

    def __init__(
        self, start: int, end: int, batch_size: int, rank: int, world: int, length: int, seed: int
    ) -> None:
        self.start, self.end, self.batch_size = start, end, batch_size
        self.rank, self.world, self.length, self.seed = rank, world, length, seed

    def __len__(self) -> int:
        return max(0, self.end - self.start)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        # An endless source (made on the fly) needs no shuffling.
        shuffle = self.length < 1 << 30
        for step in range(self.start, self.end):
            first = (step * self.world + self.rank) * self.batch_size
            indices = []
            for position in range(first, first + self.batch_size):
                index = position % self.length
                if shuffle:
                    if position // self.length != epoch:
                        epoch = position // self.length
                        generator = torch.Generator().manual_seed(self.seed * 7919 + epoch)
                        order = torch.randperm(self.length, generator=generator)
                    index = int(order[index])
                indices.append(index)
            yield indices


def learning_rate(step: int, run: RunConfig) -> float:
    """Linear warm-up, constant, linear decay to zero at the last step."""
    rise = (step + 1) / max(1, run.warmup_steps)
    fall = (run.steps - step) / max(1, run.decay_steps)
    return run.learning_rate * min(1.0, rise, fall)


class _Swapped:
    """A module with other weights, in evaluation mode, for the length of a ``with`` block."""

    def __init__(self, module: nn.Module, weights: dict[str, Tensor] | None) -> None:
        self.module, self.weights = module, weights

    def __enter__(self) -> nn.Module:
        self.was_training = self.module.training
        self.own = {k: v.clone() for k, v in self.module.state_dict().items()}
        if self.weights is not None:
            self.module.load_state_dict(self.weights)
        return self.module.eval()

    def __exit__(self, *_: object) -> None:
        self.module.load_state_dict(self.own)
        self.module.train(self.was_training)


class _MetricsLog:
    """``metrics.csv``, and TensorBoard where it is installed."""

    def __init__(self, out: Path, start: int) -> None:
        self.path = out / METRICS_NAME
        out.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, str]] = []
        if start > 0 and self.path.exists():
            rows = _read_rows(self.path, start)
        self.rows: list[dict[str, Any]] = list(rows)
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board: Any = SummaryWriter(out / "tensorboard", purge_step=start)
        except ImportError:
            self.board = None

    def write(self, step: int, values: dict[str, float]) -> None:
        self.rows.append({"step": step, **{k: f"{v:.6g}" for k, v in values.items()}})
        names = list(dict.fromkeys(key for row in self.rows for key in row))

        def write_rows(path: Path) -> None:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, names, restval="")
                writer.writeheader()
                writer.writerows(self.rows)

        write_atomically(self.path, write_rows)
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def _read_rows(path: Path, last: int) -> list[dict[str, str]]:
    """The rows of ``metrics.csv`` up to step ``last``: what is after it will be logged again."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file, strict=True) if int(row["step"]) <= last]
        if any(None in row for row in rows):  # a row longer than the first
            raise ValueError("a row has too many entries")
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise CheckpointError(
            f"{path}: not a readable log of metrics ({error}); move it away to begin another"
        ) from error
    return rows


def _read_metadata(path: Path) -> tuple[int, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
        step, config = int(metadata["step"]), json.loads(metadata["config"])
        if step < 0 or not isinstance(config, dict):
            raise ValueError("step or config is damaged")
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable training state ({error})") from error
    return step, config
