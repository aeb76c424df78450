# SPDX-License-Identifier: Apache-2.0
"""Folders of pictures with captions."""

import json
from pathlib import Path

import pytest
from PIL import Image

from t2p_fast.data.folder import CaptionedFolder


def write(folder: Path, lines: list[str]) -> Path:
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_pictures_are_cropped_and_resized(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (60, 20), "blue")
    picture.paste("red", (20, 0, 40, 20))
    picture.save(tmp_path / "wide.png")
    line = json.dumps({"file_name": "wide.png", "text": "a red square"})
    folder = CaptionedFolder(write(tmp_path, [line, ""]), size=16)
    assert len(folder) == 1
    assert folder[0].caption == "a red square"
    assert folder[0].image.shape == (16, 16, 3)
    assert tuple(folder[0].image[8, 8]) == (255, 0, 0)
    assert folder[0].image[..., 0].min() > 180


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1 is not an object with file_name and text"),
        ([json.dumps({"file_name": "a.png"})], "line 1 is not an object"),
        (["[" * 100_000], "line 1 is not an object"),
        (['{"file_name": "a.png", "text": ' + "1" * 5000 + "}"], "line 1 is not an object"),
        (['{"file_name": "a.png", "text": "\\ud800"}'], "line 1 is not an object"),
        ([""], "names no pictures"),
    ],
)
def test_bad_metadata(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CaptionedFolder(write(tmp_path, lines))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metadata\.jsonl: not a readable file"):
        CaptionedFolder(tmp_path)
    (tmp_path / "a.png").write_bytes(b"nothing")
    folder = CaptionedFolder(write(tmp_path, [json.dumps({"file_name": "a.png", "text": "x"})]))
    with pytest.raises(ValueError, match=r"a\.png: not a readable picture"):
        folder[0]
