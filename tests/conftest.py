# SPDX-License-Identifier: Apache-2.0
"""Fixtures that the tests of several ops share."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("dev", max_examples=25, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=200, deadline=None, derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where ops run")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test: `pytest --device cuda` runs the same tests on a GPU."""
    return torch.device(request.config.getoption("--device"))


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
