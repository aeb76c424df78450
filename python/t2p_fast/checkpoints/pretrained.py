# SPDX-License-Identifier: Apache-2.0
"""``from_pretrained`` and ``save_pretrained``: ``config.json`` + ``model.safetensors``.

The layout is that of the hub. ``huggingface_hub``'s own mixin is not used because it removes the
old ``config.json`` before it writes the weights, so a failed save would lose the old model.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from t2p_fast.checkpoints.configs import config_from_dict
from t2p_fast.checkpoints.files import (
    CheckpointError,
    check_finite,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
EMBEDDED = Path(__file__).resolve().parent.parent / "weights"


def resolve_folder(name: str | Path, *, revision: str | None = None) -> Path:
    """The folder that ``name`` means: ``"embedded"``, a folder, or a repository on the hub.

    Raises:
        CheckpointError: if there is no such folder and the hub does not deliver it.
    """
    if str(name) == "embedded":
        return EMBEDDED
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{name}: is a file, expected a folder with {CONFIG_NAME}")
    if str(name).startswith((".", "/", "~")) or str(name).count("/") != 1:
        raise CheckpointError(f"{name}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors"]
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{name}: no such folder, and the hub did not deliver it ({reason})"
        ) from error


class _NoInit(TorchFunctionMode):
    """Leaves out ``torch.nn.init``, which on meta tensors only imports 800 modules."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class PretrainedModel(nn.Module):
    """A module whose constructor takes one dataclass, ``config_class``, kept as ``self.config``."""

    config_class: ClassVar[type[Any]]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes ``config.json`` and ``model.safetensors`` into ``folder``, each atomically.

        Args:
            folder: made if it does not exist.
            dtype: floating-point tensors are stored in this type; ``None`` keeps theirs.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict()
        if dtype is not None:
            state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
        write_safetensors(folder / WEIGHTS_NAME, state)
        config = {"_class_name": type(self).__name__, **dataclasses.asdict(self.config)}
        write_json(folder / CONFIG_NAME, config)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        subfolder: str = "",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        revision: str | None = None,
    ) -> Self:
        """Loads a model in evaluation mode.

        Args:
            name: a folder, a hub repository (``"user/model"``), or ``"embedded"``.
            subfolder: where in it ``config.json`` and ``model.safetensors`` are.
            dtype: type of the floating-point weights.
            device: where the model goes.
            revision: branch, tag or commit of the hub repository.

        Raises:
            CheckpointError: if files are missing, damaged, or belong to another model.
            TypeError: if ``dtype`` is not a floating-point type.
            RuntimeError: if torch cannot use ``device``.
        """
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"from_pretrained: dtype is {dtype!r}, expected such as torch.float32")
        device = check_device("from_pretrained", device)
        folder = resolve_folder(name, revision=revision) / subfolder
        config = cls.read_config(folder)
        state = read_safetensors(folder / WEIGHTS_NAME)
        try:
            with torch.device("meta"), _NoInit():
                model = cls(config)
        except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder / CONFIG_NAME}: does not describe a {cls.__name__} ({error})"
            ) from error
        _check_fit(f"{folder / WEIGHTS_NAME}: ", cls.__name__, state, model.state_dict())
        # Assigning in place of copying halves the time and the memory of loading.
        model.load_state_dict(state, assign=True)
        return model.to(device=device, dtype=dtype).requires_grad_(False).eval()

    @classmethod
    def read_config(cls, folder: str | Path) -> Any:
        """Reads ``config.json`` of ``folder`` into ``config_class``."""
        path = Path(folder) / CONFIG_NAME
        values = read_json(path)
        name = values.pop("_class_name", cls.__name__)
        if name != cls.__name__:
            raise CheckpointError(f"{path}: is a checkpoint of {name}, expected {cls.__name__}")
        return config_from_dict(cls.config_class, values, str(path))


def check_device(op: str, device: str | torch.device) -> torch.device:
    """``device`` as torch names it, if torch can use it on this machine.

    Raises:
        RuntimeError: if not, with torch's own words.
    """
    try:
        checked = torch.device(device)
        torch.empty(0, device=checked)
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # built without CUDA
        raise RuntimeError(
            f"{op}: device is {str(device)!r}, which torch cannot use here "
            f"({str(error).splitlines()[0]})"
        ) from error
    return checked


def _check_fit(
    source: str, name: str, state: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    """Raises CheckpointError unless the tensors that were read are those of the model."""
    what = f"{source}does not fit {name}: "
    for key in sorted(expected.keys() | state.keys()):
        if key not in state:
            raise CheckpointError(f"{what}{key} is missing")
        if key not in expected:
            raise CheckpointError(f"{what}{key} is not one of its tensors")
        mine, theirs = expected[key], state[key]
        if theirs.shape != mine.shape:
            raise CheckpointError(
                f"{what}{key} is {list(theirs.shape)}, expected {list(mine.shape)}"
            )
        # Any floating-point type of 16 bits or more may stand for another; nothing else may.
        fits = theirs.dtype == mine.dtype or (
            theirs.is_floating_point() and mine.is_floating_point() and theirs.itemsize > 1
        )
        if not fits:
            raise CheckpointError(f"{what}{key} is {theirs.dtype}, expected {mine.dtype}")
    check_finite(source, state)
