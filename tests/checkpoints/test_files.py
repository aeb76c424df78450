# SPDX-License-Identifier: Apache-2.0
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from t2p_fast.checkpoints import (
    CheckpointError,
    read_json,
    read_safetensors,
    write_atomically,
    write_json,
    write_safetensors,
)


def test_write_atomically_replaces_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), OSError("odd")])
def test_a_failing_writer_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half of the ne")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_no_reader_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half of the ne")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path  # a rename within one file system
        assert temporary.suffix == ".txt"  # writers may choose the format by it

    write_atomically(path, write)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
def test_permissions_are_those_of_an_ordinary_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", {})
        (tmp_path / "ordinary").touch()
        assert os.umask(umask) == umask  # and the umask is as it was
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_full_disk_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.json'") as caught:
        write_json(path, {"new": 2})
    assert caught.value.errno == errno.ENOSPC
    assert read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_disk_that_fills_up_while_writing(tmp_path: Path, run_python: Callable[..., str]) -> None:
    """A limit on the size of files fails where a full disk does: inside of write()."""
    write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    write_json(tmp_path / "a.json", {"old": 1})
    program = f"""
import resource, signal, torch
from t2p_fast.checkpoints import write_json, write_safetensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
for write in (
    lambda: write_safetensors({str(tmp_path / "a.safetensors")!r}, {{"x": torch.zeros(10_000)}}),
    lambda: write_json({str(tmp_path / "a.json")!r}, {{"new": "x" * 20_000}}),
):
    try:
        write()
    except OSError as error:
        print(error)
"""
    lines = run_python(program).splitlines()
    assert len(lines) == 2, lines
    assert "a.safetensors" in lines[0]
    assert "a.json" in lines[1]
    assert read_safetensors(tmp_path / "a.safetensors")["x"].tolist() == [1, 1]
    assert read_json(tmp_path / "a.json") == {"old": 1}
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.safetensors"]


def test_missing_folder_is_named_without_the_temporary_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'.*/none/a\.json'$"):
        write_json(tmp_path / "none" / "a.json", {})


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True], "b": {"c": "grün ☃"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "grün ☃" in (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1', "not a readable JSON file"),
        (b"", "not a readable JSON file"),
        (b"\xff\xfe\x00", "not a readable JSON file"),
        (b"[" * 100_000, "not a readable JSON file"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not a readable JSON file"),
        (b"[1, 2]", "expected a JSON object, got list"),
    ],
)
def test_damaged_json_names_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"broken\.json: {message}") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.json: not a readable JSON file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(CheckpointError, match=r"none\.st: not a readable safetensors file"):
        read_safetensors(tmp_path / "none.st")


def test_safetensors_round_trip(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "transposed": base.T,
        "half": base.bfloat16(),
        "integers": torch.tensor([1 << 40, -1]),
        "scalar": torch.tensor(3.0, requires_grad=True),
        "empty": torch.empty(0, 3),
    }
    write_safetensors(tmp_path / "a.st", tensors, {"step": "3"})
    read = read_safetensors(tmp_path / "a.st")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_truncated_safetensors_names_the_file(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.safetensors"
    write_safetensors(path, {"x": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        CheckpointError, match=r"cut\.safetensors: not a readable safetensors file"
    ) as caught:
        read_safetensors(path)
    assert "\n" not in str(caught.value)


def test_something_else_than_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text(json.dumps({"a": 1}) * 100)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_safetensors(path)


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real" / "a.json")
    for value in ({"a": 1}, {"a": 2}):  # a link to nothing yet, and to a file
        write_json(link, value)
        assert link.is_symlink()
        assert read_json(tmp_path / "real" / "a.json") == value
    assert os.listdir(tmp_path / "real") == ["a.json"]


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pipe.json"
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"pipe\.json: is a pipe or a device, expected a file"):
        write_json(path, {})
    assert os.listdir(tmp_path) == ["pipe.json"]


@pytest.mark.parametrize("name", ["x" * 250 + ".png", "a." + "x" * 252, "ü" * 127])
def test_the_longest_names(tmp_path: Path, name: str) -> None:
    write_atomically(tmp_path / name, lambda temporary: temporary.write_text("new"))
    assert os.listdir(tmp_path) == [name]


def test_temporary_files_of_killed_writers_are_removed(
    tmp_path: Path, run_python: Callable[..., str]
) -> None:
    path = tmp_path / "a.txt"
    program = f"""
import os, signal
from t2p_fast.checkpoints import write_atomically
def write(temporary):
    temporary.write_text("half of the ne")
    os.kill(os.getpid(), signal.SIGKILL)
write_atomically({str(path)!r}, write)
"""
    run_python(program, fails=True)
    assert len(os.listdir(tmp_path)) == 1
    (tmp_path / ".b.txt.abcdefgh.txt").write_text("of another file")

    def write(temporary: Path) -> None:
        temporary.write_text("new")
        # One writer amid another's work leaves it alone.
        write_atomically(path, lambda other: other.write_text("newer"))
        assert temporary.exists()

    write_atomically(path, write)
    assert path.read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == [".b.txt.abcdefgh.txt", "a.txt"]
