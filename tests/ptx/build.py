# SPDX-License-Identifier: Apache-2.0
"""Builds `_C_emulated`: the package's own sources, with PTX inside and no GPU behind.

CMake and Ninja see to it that a second run of the tests compiles only what has changed. The folder
is `build/emulated` of the repository, or `T2P_EMULATED_BUILD`; the virtual architecture 80, or
`T2P_EMULATED_ARCH`. `T2P_EMULATED_CMAKE` has further options for CMake.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["build", "compile_library", "compile_ptx", "missing", "nvcc"]

ROOT = Path(__file__).parents[2]


def nvcc() -> str | None:
    """The CUDA compiler, None where there is none."""
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def missing() -> str | None:
    """What `build` lacks, None if nothing."""
    if nvcc() is None:
        return "there is no nvcc on the PATH and no CUDACXX"
    if _find("ninja") is None or importlib.util.find_spec("pybind11") is None:
        return "the emulated build needs: pip install cmake ninja pybind11"
    cmake = _find("cmake")
    version = re.search(r"(\d+)\.(\d+)", _run(cmake, "--version")) if cmake else None
    if version is None or (int(version[1]), int(version[2])) < (3, 26):
        return "the emulated build needs CMake 3.26 or newer: pip install cmake"
    return None


def build() -> Path:
    """Compiles what has changed and returns the path of the library."""
    arch = os.environ.get("T2P_EMULATED_ARCH", "80")
    folder = Path(os.environ.get("T2P_EMULATED_BUILD", ROOT / "build" / "emulated")) / arch
    folder.mkdir(parents=True, exist_ok=True)
    pybind11 = _run(sys.executable, "-m", "pybind11", "--cmakedir").strip()
    if not (folder / "build.ninja").exists():
        _run(
            _tool("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), "-DT2P_CUDA=ON",
            "-DT2P_EMULATE=ON", "-DT2P_VERSION=emulated", "-DCMAKE_BUILD_TYPE=Debug",
            f"-DCMAKE_CUDA_ARCHITECTURES={arch}-virtual", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}",
            *os.environ.get("T2P_EMULATED_CMAKE", "").split(),
        )  # fmt: skip
    _run(_tool("cmake"), "--build", str(folder), "--target", "_C_emulated")
    (library,) = folder.glob("_C_emulated*.so")
    return library


def compile_ptx(source: Path, arch: str = "80") -> str:
    """The PTX of one file, compiled again only if it has changed."""
    options = ["-ptx", f"-arch=compute_{arch}", "-lineinfo", str(source)]
    return _compiled([source], f"{arch}.ptx", options).read_text()


def compile_library(source: Path, arch: str = "80") -> Path:
    """One file as a library with PTX inside and the runtime of `cudart/`, in the same way."""
    runtime = Path(__file__).parent / "cudart" / "fake_cudart.cpp"
    options = [
        "-shared", "-Xcompiler=-fPIC", "-cudart=none", "--no-compress", "-lineinfo",
        "-DT2P_EMULATED_TILE",
        f"-gencode=arch=compute_{arch},code=compute_{arch}", f"-I{ROOT / 'csrc'}", str(source),
        str(runtime),
    ]  # fmt: skip
    common = ROOT / "csrc" / "common"
    headers = [common / "cuda_check.cuh", common / "carver.h"]
    return _compiled([source, runtime, *headers], f"{arch}.so", options)


def _compiled(sources: list[Path], ending: str, options: list[str]) -> Path:
    """What nvcc makes of the first of these; kept by what is in all of them."""
    folder = Path(os.environ.get("T2P_EMULATED_BUILD", ROOT / "build" / "emulated"))
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    result = folder / f"{sources[0].stem}-{key}-{ending}"
    if not result.exists():
        compiler = nvcc()
        assert compiler
        partial = result.with_suffix(f".{os.getpid()}")
        _run(compiler, "-std=c++17", *options, "-o", str(partial))
        partial.replace(result)
    return result


def _tool(name: str) -> str:
    """A program of this environment, or of the path."""
    found = _find(name)
    if found is None:
        raise RuntimeError(f"the emulated build needs {name}: pip install cmake ninja pybind11")
    return found


def _find(name: str) -> str | None:
    own = Path(sys.executable).parent / name
    return str(own) if own.exists() else shutil.which(name)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout
