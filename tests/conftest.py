# SPDX-License-Identifier: Apache-2.0
"""Fixtures that the tests of several ops share."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("dev", max_examples=25, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=200, deadline=None, derandomize=True)
hypothesis.settings.register_profile(
    "emulated", max_examples=8, deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

_EMULATION = pytest.StashKey[Any]()
_NO_NVCC = "the CUDA kernels are emulated from what nvcc emits, and there is no nvcc on the PATH"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", choices=("cpu", "emulated", "cuda"), help="where ops run"
    )
    parser.addoption(
        "--every-kernel", action="store_true",
        help="with an emulated device: fail if there is a kernel that no test has launched",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") != "emulated":
        return
    hypothesis.settings.load_profile("emulated")
    from ptx import build, emulation

    if build.nvcc() is None:
        return  # every test is skipped for that reason
    if lacking := build.missing():
        raise pytest.UsageError(lacking)
    # The references are of small shapes, where torch's threads wait for each other.
    torch.set_num_threads(1)
    config.stash[_EMULATION] = emulation.install(build.build())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With an emulated device, only the tests whose kernels run there; not those for big shapes."""
    if config.getoption("--device") != "emulated":
        return
    chosen = [item for item in items if "device" in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
    for item in items:
        if _EMULATION not in config.stash:
            item.add_marker(pytest.mark.skip(reason=_NO_NVCC))
        elif marker := item.get_closest_marker("not_emulated"):
            item.add_marker(pytest.mark.skip(reason=marker.kwargs["reason"]))


def _never_launched(config: pytest.Config) -> list[str]:
    if not config.getoption("--every-kernel") or _EMULATION not in config.stash:
        return []
    names: list[str] = config.stash[_EMULATION].device.never_launched()
    return names


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _never_launched(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if names := _never_launched(config):
        terminalreporter.section(f"{len(names)} kernels that no test has launched", red=True)
        for name in names:
            terminalreporter.line(name)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test: `pytest --device cuda` runs the same tests on a GPU.

    With `--device emulated` tensors are on the CPU, and ops run their CUDA kernels on them in an
    emulator (`tests/ptx`), which raises on races, accesses out of bounds and the like.
    """
    name = request.config.getoption("--device")
    return torch.device("cpu" if name == "emulated" else name)


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> str:
    """Whose kernels run on `device`, "cpu" or "cuda"."""
    return "cpu" if request.config.getoption("--device") == "cpu" else "cuda"


@pytest.fixture
def emulated(request: pytest.FixtureRequest) -> bool:
    """Whether kernels are emulated: then shapes had better be small."""
    return bool(request.config.getoption("--device") == "emulated")


@pytest.fixture
def opcheck(emulated: bool) -> Callable[..., object]:
    """torch.library.opcheck, or the part of it that depends on which kernels run."""
    if emulated:
        return functools.partial(
            torch.library.opcheck, test_utils=("test_schema", "test_faketensor")
        )
    return torch.library.opcheck


@pytest.fixture
def hopper(emulated: bool, kernels: str) -> Iterator[None]:
    """An emulated device is one of compute capability 9.0."""
    if kernels == "cpu":
        pytest.skip("as on any other CPU")
    if not emulated:
        yield
        return
    from t2p_fast._library import _C

    before, _C.device.capability = _C.device.capability, (9, 0)
    yield
    _C.device.capability = before


@pytest.fixture
def unwaiting(emulated: bool, device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """A context in which what waits for the GPU raises, also an op that is known to."""

    @contextmanager
    def of_emulated() -> Iterator[None]:
        from t2p_fast._library import _C

        _C.may_wait = False
        try:
            yield
        finally:
            _C.may_wait = True

    @contextmanager
    def of_cuda() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    if emulated:
        return of_emulated
    return of_cuda if device.type == "cuda" else nullcontext


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Fills what torch.empty returns with NaN, so that unwritten results show."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Runs a program in a fresh interpreter, with extra environment variables, for its output."""

    def run(program: str, *, fails: bool = False, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert (done.returncode != 0) == fails, done.stderr
        return done.stderr if fails else done.stdout

    return run
