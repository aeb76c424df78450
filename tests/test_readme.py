# SPDX-License-Identifier: Apache-2.0
"""Every Python snippet of the README runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_there_are_snippets_and_both_commands() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(SNIPPETS) >= 4
    assert "<!-- command: picture -->" in text
    assert "<!-- command: tests -->" in text


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: s.splitlines()[-1][:40])
def test_snippet(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
