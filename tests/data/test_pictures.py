# SPDX-License-Identifier: Apache-2.0
"""Pictures of any format as 8-bit RGB."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from t2p_fast.data.folder import CaptionedFolder
from t2p_fast.data.pictures import read_picture, to_rgb

RAMP = np.linspace(0, 255, 16 * 12).reshape(16, 12)


def values(path: Path) -> Any:
    picture = read_picture(path)
    assert picture.mode == "RGB"
    return np.asarray(picture)[..., 0]


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_sixteen_bit_gray_is_scaled(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"gray.{suffix}"
    sixteen = np.rint(RAMP * 257).astype(np.uint16)
    if suffix == "pgm":
        path.write_bytes(b"P5 12 16 65535\n" + sixteen.astype(">u2").tobytes())
    else:
        Image.fromarray(sixteen).save(path)
    assert np.array_equal(values(path), np.rint(RAMP))
    if suffix == "png":
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "gray.png", "text": "gray"}')
        image = CaptionedFolder(tmp_path, size=16)[0].image
        assert image.min() < 40
        assert image.max() > 200
        with Image.open(path) as opened:
            assert np.array_equal(np.asarray(to_rgb(opened))[..., 1], np.rint(RAMP))


@pytest.mark.parametrize(("dtype", "mode"), [(np.int32, "I"), (np.float32, "F")])
def test_pictures_of_32_bit_numbers_are_refused(tmp_path: Path, dtype: Any, mode: str) -> None:
    path = tmp_path / "a.tiff"
    Image.fromarray((RAMP * 1e5).astype(dtype)).save(path)
    with pytest.raises(ValueError, match=rf"a\.tiff: .*mode is {mode}, 32-bit numbers, expected 8"):
        read_picture(path)


def rotated(**options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    file = io.BytesIO()
    Image.fromarray(RAMP.astype(np.uint8)).save(file, "JPEG", exif=exif, **options)
    return file.getvalue()


def test_exif_turns_the_picture_and_a_broken_one_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(rotated())
    assert values(path).shape == (12, 16)
    for damage in ((b"MM\0*", b"XX\0*"), (b"\x01\x12\0\x03", b"\x01\x12\0\xff")):
        assert damage[0] in rotated()
        path.write_bytes(rotated().replace(*damage))
        assert values(path).shape == (16, 12)


def test_damaged_pictures_are_named_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    whole = rotated(quality=100)
    for content in (whole[:-100], whole[:100], b"", b"no picture"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.jpg: not a readable picture \(") as caught:
            read_picture(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"none\.png: no such file"):
        read_picture(tmp_path / "none.png")


def test_warnings_are_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    palette = Image.fromarray(RAMP.astype(np.uint8)).convert("P")
    palette.save(path, transparency=bytes(range(256)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # warns above it, refuses above twice it
    assert values(path).shape == (16, 12)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(ValueError, match=r"not a readable picture .*decompression bomb"):
        read_picture(path)
