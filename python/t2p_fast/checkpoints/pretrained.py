# SPDX-License-Identifier: Apache-2.0
"""``from_pretrained`` and ``save_pretrained``: ``config.json`` + ``model.safetensors``.

The layout is that of the hub. ``huggingface_hub``'s own mixin is not used because it removes the
old ``config.json`` before it writes the weights, so a failed save would lose the old model.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from t2p_fast.checkpoints.files import (
    CheckpointError,
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
        """
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
        expected = model.state_dict()
        for key in sorted(expected.keys() | state.keys()):
            what = f"{folder / WEIGHTS_NAME}: does not fit {cls.__name__}: "
            if key not in state:
                raise CheckpointError(f"{what}{key} is missing")
            if key not in expected:
                raise CheckpointError(f"{what}{key} is not one of its tensors")
            if state[key].shape != expected[key].shape:
                raise CheckpointError(
                    f"{what}{key} is {list(state[key].shape)}, expected {list(expected[key].shape)}"
                )
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


def config_from_dict(config_class: type[Any], values: dict[str, Any], source: str) -> Any:
    """Builds a config dataclass, with lists as tuples and unknown names refused."""
    known = {field.name for field in dataclasses.fields(config_class)}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise CheckpointError(
            f"{source}: unknown option {unknown[0]!r} for {config_class.__name__}, "
            f"known are {', '.join(sorted(known))}"
        )
    frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    hints = typing.get_type_hints(config_class)
    for option, value in frozen.items():
        if not _fits(value, hints[option]):
            expected = getattr(hints[option], "__name__", None)
            if typing.get_origin(hints[option]) is not None or expected is None:
                expected = str(hints[option]).replace("typing.", "")
            raise CheckpointError(f"{source}: {option} is {value!r}, expected {expected}")
    try:
        return config_class(**frozen)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value``, as read from JSON, may stand where ``hint`` is asked for."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments[-1] is Ellipsis:
            return all(_fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
