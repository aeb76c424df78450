# SPDX-License-Identifier: Apache-2.0
"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another model; the message names the file."""


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Calls ``write(temporary)`` beside ``path``, then renames: no reader sees half a file.

    Whatever fails (a full disk, no permission, an interrupt), ``path`` keeps its old content and
    the temporary file is removed; one that a killed process left is removed by the next write to
    the same path. Of a symbolic link, the file it points to is replaced.

    Raises:
        OSError: that names ``path``, not the temporary file.
        ValueError: if ``path`` is a pipe or a device.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise ValueError(f"{path}: is a pipe or a device, expected a file")
    try:
        _write_and_rename(target, write)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def _write_and_rename(path: Path, write: Callable[[Path], object]) -> None:
    # Shortened, for file systems allow names of 255 bytes; writers may go by the suffix.
    prefix, suffix = f".{path.name[:40]}.", path.suffix[:20]
    _remove_left_over(path.parent, f"{glob.escape(prefix)}????????{glob.escape(suffix)}")
    handle, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=path.parent)
    temporary = Path(name)
    try:
        _try_lock(handle)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files private; give back what an ordinary open() would have given.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def _remove_left_over(folder: Path, pattern: str) -> None:
    """Removes temporary files whose writer is gone: the kernel released the lock on them."""
    for left_over in folder.glob(pattern):
        with contextlib.suppress(OSError), left_over.open("rb") as file:
            # An empty one may have been made this moment, and not be locked yet.
            if os.fstat(file.fileno()).st_size and _try_lock(file.fileno()):
                left_over.unlink()


def _try_lock(handle: int) -> bool:
    """Locks an open file until it is closed; False if another holds it or none can be had."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: if the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # huge numbers are a bare ValueError
        raise CheckpointError(f"{path}: not a readable JSON file ({_reason(error)})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors as safetensors, atomically; they are made contiguous and moved to the CPU."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    meta = {"format": "pt", **(metadata or {})}
    try:
        write_atomically(path, lambda temporary: save_file(ready, str(temporary), metadata=meta))
    except SafetensorError as error:  # a full disk, for one; not an OSError by itself
        raise OSError(f"{path}: could not be written ({_reason(error)})") from error


def read_safetensors(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Reads all tensors of a safetensors file.

    Raises:
        CheckpointError: if the file is missing, truncated or not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path), device=str(device))
    except (OSError, SafetensorError, UnicodeEncodeError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({_reason(error)})"
        ) from error


def check_finite(source: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError, beginning with ``source``, if a tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{source}{name} holds NaN or infinity, expected finite numbers")


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
