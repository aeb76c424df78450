# SPDX-License-Identifier: Apache-2.0
"""The house rules that a machine can check."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "t2p_fast"
STEMS = re.findall(r"^t2p_add_op\((\w+)", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)

# A module imports from its own layer or from those after it in its row; "nothing" is below all.
LAYERS = {
    "cli": ["interop", "training", "pipelines", "models", "schedulers", "nn", "checkpoints",
            "data", "metrics", "ops", "reference", "weights", "benchmarks", "_library", "_checks"],
    "interop": ["training", "models", "schedulers", "nn", "checkpoints", "ops", "_checks"],
    "training": ["pipelines", "models", "schedulers", "nn", "checkpoints", "data", "metrics",
                 "ops", "_checks"],
    "pipelines": ["models", "schedulers", "nn", "checkpoints", "data", "metrics", "ops",
                  "weights", "_checks"],
    "models": ["schedulers", "nn", "checkpoints", "ops", "_checks"],
    "nn": ["checkpoints", "ops", "_checks"],
    "schedulers": ["ops", "_checks"],
    "checkpoints": ["_checks"],
    "data": ["_checks"],
    "metrics": ["data", "_checks"],
    "ops": ["memory", "_library", "_checks"],
    "memory": ["_library"],
    "reference": [],
    "_library": ["_C"],
    "_checks": ["_library"],
}  # fmt: skip


def _imports(path: Path) -> set[str]:
    """First components of what a file imports from t2p_fast."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            head, *rest = node.module.split(".")
            if head == "t2p_fast":
                found |= {rest[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {name[1] for name in names if name[0] == "t2p_fast" and len(name) > 1}
    return found


@pytest.mark.parametrize("stem", STEMS)
def test_op_has_its_five_places(stem: str) -> None:
    for path in (
        f"csrc/{stem}/{stem}.h",
        f"python/t2p_fast/ops/{stem}.py",
        f"python/t2p_fast/reference/{stem}.py",
        f"tests/ops/test_{stem}.py",
        f"benchmarks/bench_{stem}.py",
    ):
        assert (ROOT / path).is_file(), f"op {stem} lacks {path}"


def test_every_kernel_folder_is_built() -> None:
    folders = {p.name for p in (ROOT / "csrc").iterdir()} - {"common", "bindings"}
    assert folders == set(STEMS)


def test_file_budgets() -> None:
    budgets = {"csrc/**/*.*": 400, "python/**/*.py": 600, "tests/**/*.py": 600}
    for pattern, budget in budgets.items():
        for path in ROOT.glob(pattern):
            lines = len(path.read_text().splitlines())
            assert lines <= budget, (
                f"{path.relative_to(ROOT)} has {lines} lines, more than {budget}"
            )


def test_imports_point_one_way() -> None:
    for path in PACKAGE.rglob("*.py"):
        layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if layer == "__init__":
            continue
        allowed = {layer, "__version__", "build_info", *LAYERS.get(layer, [])}
        wrong = _imports(path) - allowed
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_kernels_know_no_torch() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text()
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", text), path
        if path.parent.name != "bindings" and path.name != "bind.cpp":
            assert "pybind11/" not in text, f"{path.relative_to(ROOT)} knows Python"


def test_sources_carry_their_licence() -> None:
    sources = [p for pattern in ("csrc/**/*.*", "python/**/*.py") for p in ROOT.glob(pattern)]
    missing = [
        p for p in sources if "SPDX-License-Identifier: Apache-2.0" not in p.read_text()[:80]
    ]
    assert not missing
