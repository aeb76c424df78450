# SPDX-License-Identifier: Apache-2.0
import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from t2p_fast.checkpoints import (
    CheckpointError,
    PretrainedModel,
    config_from_dict,
    read_json,
    read_safetensors,
    resolve_folder,
    write_json,
    write_safetensors,
)


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    width: int = 3
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[float, float] = (0.1, 0.2)
    decay: float | None = None
    flag: bool = False

    def __post_init__(self) -> None:
        if self.width == 13:
            raise ValueError("width is 13")


class Toy(PretrainedModel):
    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.linear = nn.Linear(config.width, 2)
        self.register_buffer("steps", torch.tensor([7]))


class Other(Toy):
    pass


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    Toy(ToyConfig(sizes=(4, 5))).save_pretrained(tmp_path / "toy")
    return tmp_path / "toy"


def change_config(folder: Path, **changes: Any) -> None:
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **changes})


def test_round_trip(tmp_path: Path) -> None:
    model = Toy(ToyConfig(sizes=(4, 5), decay=0.9))
    model.save_pretrained(tmp_path / "a" / "b")
    loaded = Toy.from_pretrained(tmp_path / "a" / "b")
    assert loaded.config == model.config
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert Toy.from_pretrained(tmp_path, subfolder="a/b").config == model.config


def test_stored_and_loaded_dtypes(tmp_path: Path) -> None:
    model = Toy(ToyConfig())
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    stored = read_safetensors(tmp_path / "model.safetensors")
    assert stored["linear.weight"].dtype == torch.bfloat16
    assert stored["steps"].dtype == torch.int64
    loaded = Toy.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.linear.weight, model.linear.weight.bfloat16().float())
    half = Toy.from_pretrained(tmp_path, dtype=torch.float16)
    assert half.dtype == torch.float16
    assert half.steps.dtype == torch.int64
    assert model.dtype == torch.float32  # saving does not change the model


def test_saving_over_the_weights_that_are_in_use(saved: Path) -> None:
    """Loaded weights may be views of the file; saving must not pull it from under them."""
    model = Toy.from_pretrained(saved)
    before = model.linear.weight.clone()
    model.save_pretrained(saved)
    assert torch.equal(model.linear.weight, before)
    assert torch.equal(Toy.from_pretrained(saved).linear.weight, before)


def test_failed_save_keeps_the_old_model(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {f.name: f.read_bytes() for f in saved.iterdir()}

    def fsync(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(OSError, match=r"No space left on device: '.*model\.safetensors'"):
        Toy(ToyConfig(width=5)).save_pretrained(saved)
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before


def test_checkpoint_of_another_model(saved: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"config\.json: is a checkpoint of Toy, expected Other"
    ):
        Other.from_pretrained(saved)


def test_tensors_that_do_not_fit(saved: Path) -> None:
    path = saved / "model.safetensors"
    whole = read_safetensors(path)
    prefix = r"model\.safetensors: does not fit Toy: "

    write_safetensors(path, {k: v for k, v in whole.items() if k != "linear.bias"})
    with pytest.raises(CheckpointError, match=prefix + r"linear\.bias is missing"):
        Toy.from_pretrained(saved)

    write_safetensors(path, {**whole, "extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=prefix + r"extra is not one of its tensors"):
        Toy.from_pretrained(saved)

    write_safetensors(path, {**whole, "linear.weight": torch.zeros(3, 3)})
    with pytest.raises(
        CheckpointError, match=prefix + r"linear\.weight is \[3, 3\], expected \[2, 3\]"
    ):
        Toy.from_pretrained(saved)


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8]
)
def test_weights_of_another_kind_of_number(saved: Path, dtype: torch.dtype) -> None:
    path = saved / "model.safetensors"
    whole = read_safetensors(path)
    write_safetensors(path, {**whole, "linear.weight": torch.zeros(2, 3).to(dtype)})
    with pytest.raises(
        CheckpointError, match=rf"linear\.weight is {dtype}, expected torch\.float32"
    ):
        Toy.from_pretrained(saved)
    write_safetensors(path, {**whole, "steps": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"steps is torch\.float32, expected torch\.int64"):
        Toy.from_pretrained(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite(saved: Path, value: float, dtype: torch.dtype) -> None:
    path = saved / "model.safetensors"
    broken = torch.zeros(2, dtype=dtype)
    broken[1] = value
    write_safetensors(path, {**read_safetensors(path), "linear.bias": broken})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: linear\.bias holds NaN or inf"):
        Toy.from_pretrained(saved)


def test_dtype_and_device_that_cannot_be(saved: Path) -> None:
    for dtype in (torch.int64, "float16"):
        with pytest.raises(TypeError, match=r"from_pretrained: dtype is .*, expected such as"):
            Toy.from_pretrained(saved, dtype=dtype)  # type: ignore[arg-type]
    for device in ("tpu", f"cuda:{torch.cuda.device_count()}"):
        with pytest.raises(RuntimeError, match=rf"from_pretrained: device is '{device}', which"):
            Toy.from_pretrained(saved, device=device)


def test_damaged_files(saved: Path) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable"):
        Toy.from_pretrained(saved)
    (saved / "config.json").write_text('{"width": ')
    with pytest.raises(CheckpointError, match=r"config\.json: not a readable"):
        Toy.from_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: not a readable"):
        Toy.from_pretrained(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, r"unknown option 'colour' for ToyConfig, known are decay, flag, kind"),
        ({"width": "3"}, r"width is '3', expected int"),
        ({"width": True}, r"width is True, expected int"),
        ({"width": 13}, r"width is 13"),
        ({"width": -3}, r"does not describe a Toy"),
        ({"rate": None}, r"rate is None, expected float"),
        ({"kind": "c"}, r"kind is 'c', expected Literal\['a', 'b'\]"),
        ({"sizes": [1, "x"]}, r"sizes is \(1, 'x'\), expected tuple\[int, \.\.\.\]"),
        ({"sizes": 3}, r"sizes is 3, expected tuple\[int, \.\.\.\]"),
        ({"pair": [1, 2, 3]}, r"pair is \(1, 2, 3\), expected tuple\[float, float\]"),
        ({"decay": "x"}, r"decay is 'x', expected float \| None"),
        ({"flag": 1}, r"flag is 1, expected bool"),
    ],
)
def test_wrong_configurations(saved: Path, changes: dict[str, Any], message: str) -> None:
    change_config(saved, **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        Toy.from_pretrained(saved)


def test_config_from_dict_takes_lists_and_integers() -> None:
    values = {"sizes": [], "pair": [1, 0.5], "rate": 2, "decay": 1, "kind": "b", "flag": True}
    config = config_from_dict(ToyConfig, values, "here")
    assert config == ToyConfig(sizes=(), pair=(1, 0.5), rate=2, decay=1, kind="b", flag=True)


def test_resolve_folder(tmp_path: Path) -> None:
    assert resolve_folder(tmp_path) == tmp_path
    assert resolve_folder("embedded").name == "weights"
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"is a file, expected a folder with config\.json"):
        resolve_folder(tmp_path / "file")
    for name in (tmp_path / "none", "none", "./none", "a/b/c"):
        with pytest.raises(CheckpointError, match=r"(none|a/b/c): no such folder"):
            resolve_folder(name)


def test_hub_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"^nobody/nothing: no such folder, and the hub") as e:
        Toy.from_pretrained("nobody/nothing")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("error", [OSError(), OSError("first\nsecond")])
def test_hub_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"the hub did not deliver it \((OSError|first)\)$"):
        resolve_folder("nobody/nothing")


def test_hub_folder_is_loaded(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert Toy.from_pretrained("user/toy", revision="v1").config.sizes == (4, 5)
    assert asked["name"] == "user/toy"
    assert asked["revision"] == "v1"
    assert not any("bin" in p or "pt" in p for p in asked["allow_patterns"])  # no pickles
