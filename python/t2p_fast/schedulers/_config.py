# SPDX-License-Identifier: Apache-2.0
"""Configurations in the form that diffusers gives them, without diffusers.

A scheduler's `config` holds the arguments it was made with and what else its configuration file
said, so that it can be handed to another class: ``DDIMScheduler.from_config(other.config)``.
"""

import functools
import inspect
import json
import logging
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["CONFIG_NAME", "Configurable", "FrozenDict", "keeps_config", "on_host"]

CONFIG_NAME = "scheduler_config.json"

_LOG = logging.getLogger(__name__)
_DEFAULTS = "_use_default_values"  # names of the arguments that were not given
_Self = TypeVar("_Self", bound="Configurable")


@contextmanager
def on_host() -> Iterator[None]:
    """What is made here and kept is on the host, and of use outside of inference mode."""
    with torch.device("cpu"), torch.inference_mode(False):
        yield


class FrozenDict(OrderedDict[str, Any]):
    """A dict whose entries are attributes too.

    Entries do not change, but attributes may be set, as pipelines of diffusers do, and then are the
    entries. `changed` says whether one was.
    """

    changed: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for key, value in self.items():
            object.__setattr__(self, key, value)
        object.__setattr__(self, "changed", False)
        object.__setattr__(self, "_frozen", True)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the configuration has no {name!r}")

    def __setitem__(self, key: str, value: Any) -> None:
        if getattr(self, "_frozen", None):
            self._refuse()
        super().__setitem__(key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name in self:
            super().__setitem__(name, value)
            object.__setattr__(self, "changed", True)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ARG002
        raise TypeError("a configuration does not change; use register_to_config")

    __delitem__ = pop = popitem = setdefault = update = clear = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDict, (dict(self),), {"changed": self.changed}

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenDict":
        copied = FrozenDict(self)
        copied.changed = self.changed
        return copied


_Init = TypeVar("_Init", bound=Callable[..., None])


def keeps_config(init: _Init) -> _Init:
    """Wraps an `__init__` so that its arguments are in `self.config` before it runs."""
    parameters = {
        name: parameter.default
        for name, parameter in list(inspect.signature(init).parameters.items())[1:]
    }

    @functools.wraps(init)
    def wrapped(self: "Configurable", *args: Any, **kwargs: Any) -> None:
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        missing = sorted(set(parameters) - set(given))
        entries = {name: given.get(name, default) for name, default in parameters.items()}
        self.register_to_config(**entries, **{_DEFAULTS: missing})
        with on_host():
            init(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


class Configurable:
    """A class with a configuration; the names are those of diffusers' ConfigMixin."""

    config_name = CONFIG_NAME
    _deprecated_kwargs: ClassVar[tuple[str, ...]] = ()  # diffusers asks for it
    _internal_dict: Mapping[str, Any]

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            entries = self.__dict__.get("_internal_dict", {})
            owner = type(self).__name__
            if name not in entries:
                raise AttributeError(f"{owner!r} object has no attribute {name!r}")
            # Old pipelines read entries so; diffusers warns of it in the same way.
            warnings.warn(
                f"{owner}.{name} is an entry of the configuration: use {owner}.config.{name}",
                FutureWarning,
                stacklevel=2,
            )
            return entries[name]

    @property
    def config(self) -> Any:
        """The arguments and whatever else the configuration holds, as a `FrozenDict`."""
        entries = self._internal_dict
        if type(entries) is not FrozenDict:  # pipelines of diffusers put their own there
            entries = self._internal_dict = FrozenDict(entries)
            entries.changed = True
        return entries

    def register_to_config(self, **entries: Any) -> None:
        """Adds entries to the configuration, or replaces them."""
        self._internal_dict = FrozenDict({**getattr(self, "_internal_dict", {}), **entries})

    @classmethod
    def from_config(
        cls: type[_Self],
        config: Mapping[str, Any],
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """A scheduler from the configuration of one of this or of another class.

        Args:
            config: A configuration, of t2p_fast or of diffusers. Entries that the other class had
                only by default are left out, those that this class does not know are kept in
                `config` for the next.
            return_unused_kwargs: Whether to return `(scheduler, unused)`.
            **kwargs: Entries that come before those of `config`.

        Returns:
            The scheduler.

        Raises:
            ValueError: `config` is not a mapping.
        """
        if not isinstance(config, Mapping):
            raise ValueError(
                f"{cls.__name__}.from_config: expected a configuration, got a "
                f"{type(config).__name__}; from_pretrained reads files"
            )
        dropped = {*config.get(_DEFAULTS, []), _DEFAULTS, "_class_name"}
        entries = {k: v for k, v in config.items() if k not in dropped}
        expected = set(inspect.signature(cls.__init__).parameters) - {"self"}
        arguments = {k: v for k, v in entries.items() if k in expected}
        arguments |= {k: kwargs.pop(k) for k in list(kwargs) if k in expected}
        scheduler = cls(**arguments)
        hidden = {k: v for k, v in entries.items() if k not in arguments}
        scheduler.register_to_config(**hidden)
        return (scheduler, {**kwargs, **hidden}) if return_unused_kwargs else scheduler

    @classmethod
    def load_config(
        cls, path: str | os.PathLike[str], *, subfolder: str | None = None, **hub: Any
    ) -> dict[str, Any]:
        """The configuration in a file, a folder, or a repository of the Hugging Face hub."""
        folder = Path(path)
        file = folder
        if folder.is_dir():
            file = folder / (subfolder or "") / cls.config_name
            if not file.is_file():
                raise OSError(f"{cls.__name__}: {folder} has no file {file.relative_to(folder)}")
        elif not folder.is_file():
            from huggingface_hub import hf_hub_download

            known = ("cache_dir", "force_download", "local_files_only", "revision", "token")
            hub = {k: v for k, v in hub.items() if k in known and v is not None}
            file = Path(hf_hub_download(str(path), cls.config_name, subfolder=subfolder, **hub))
        try:
            config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OSError(f"{cls.__name__}: {file} is not JSON: {error}") from error
        return config

    @classmethod
    def from_pretrained(
        cls: type[_Self],
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """A scheduler from a folder or hub repository with a ``scheduler_config.json``."""
        config = cls.load_config(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        expected = set(inspect.signature(cls.__init__).parameters)
        given = {k: v for k, v in kwargs.items() if k in expected}
        return cls.from_config(config, return_unused_kwargs, **given)

    def to_json_string(self) -> str:
        """The configuration as JSON."""
        entries = {k: v for k, v in self.config.items() if k != _DEFAULTS}
        entries["_class_name"] = type(self).__name__
        return json.dumps(entries, indent=2, sort_keys=True, default=_plain) + "\n"

    def save_config(self, save_directory: str | os.PathLike[str], **_: Any) -> None:
        """Writes ``scheduler_config.json`` into a folder, which is made if need be."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.config_name).write_text(self.to_json_string(), encoding="utf-8")

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """The same as `save_config`."""
        self.save_config(save_directory, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic | Tensor):
        return value.tolist()
    return str(value)
