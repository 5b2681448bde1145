"""Checkpoints read whole: what is sound is said to be, and nothing that is wrong stays unseen."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from launch.__main__ import main
from launch.verify import verify
from parallel.shards import Piece
from tests.train.checkpoint_cases import open_checkpoints, sizes, state
from train.checkpoint.step_folders import MANIFEST, write_manifest
from train.files import CRC32, record_of


def save(root: Path, step: int, tensors: dict[str, torch.Tensor]) -> Path:
    checkpoints = open_checkpoints(root, keep_latest_k=0)
    checkpoints.save(state(step), {name: [Piece(0, each)] for name, each in tensors.items()}, sizes(tensors))
    checkpoints.wait()
    return root / f"step-{step:08d}"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {"master.w": torch.randn(300), "exp_avg.w": torch.randn(300).bfloat16(), "count": torch.arange(5)}
    return save(tmp_path_factory.mktemp("sound"), 7, tensors)


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "checkpoints" / sound.name))


def test_a_sound_one_is_said_to_be(sound: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for path in (sound, sound.parent):  # itself, and the folder of checkpoints that it is the only one of
        assert main(["verify", f"checkpoint={path}"]) == 0
        said = capfd.readouterr().out
        assert said.startswith(f"{sound} is sound, and every number of it finite: ")
        assert "3 tensors of 605 numbers" in said


def test_every_flipped_byte_is_found_and_named(copy: Path) -> None:
    dice = random.Random(int(os.environ["HALOCLINE_SEED"]))
    for path in sorted(copy.iterdir()):
        content = path.read_bytes()
        for _ in range(12):
            at = dice.randrange(len(content))
            flipped = bytearray(content)
            flipped[at] ^= 1 << dice.randrange(8)
            path.write_bytes(flipped)
            assert any(str(path) in each for each in verify(copy).troubles), f"{path.name} at byte {at}"
        path.write_bytes(content)
    assert verify(copy).troubles == []


def test_all_troubles_are_named_not_only_the_first(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (copy / "stray.txt").write_text("x")
    (copy / "config.yaml").unlink()
    data = sorted(copy.glob("*.distcp"))[0]
    data.write_bytes(data.read_bytes()[:-9])
    assert main(["verify", f"checkpoint={copy}"]) == 2
    said = capfd.readouterr().err
    assert f"{copy} is not sound" in said
    assert f"{copy / 'config.yaml'} is missing" in said and f"{data} is damaged" in said
    assert f"{copy / 'stray.txt'} is not in the manifest" in said


def test_numbers_that_are_not_finite_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By bands, of which the first bad number may be in any."""
    monkeypatch.setattr("launch.verify.BAND_NUMEL", 100)
    weight = torch.randn(350)
    weight[[120, 121, 349]] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    found = verify(save(tmp_path, 3, {"master.w": weight, "ok": torch.zeros(10)}))
    assert found.troubles == ["master.w has 3 numbers of 350 that are not finite, the first at 120"]


def test_files_that_agree_with_their_checksums_may_still_hold_no_tensor(copy: Path) -> None:
    """As when a file was spoilt before it was summed up."""
    data = sorted(copy.glob("*.distcp"))[0]
    data.write_bytes(bytes(len(data.read_bytes())))
    records = {path.name: record_of(path, CRC32) for path in copy.iterdir() if path.name != MANIFEST}
    write_manifest(copy, records)
    troubles = verify(copy).troubles
    assert troubles and all("cannot be read" in each for each in troubles)


def test_of_a_run_every_checkpoint_is_read(copy: Path, sound: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(sound, copy.with_name("step-00000009")))
    never = copy.with_name("step-00000011")
    never.mkdir()
    (other / "state.json").write_text("{}")
    assert main(["verify", f"checkpoint={copy.parent.parent}"]) == 2
    out, error = capfd.readouterr()
    assert out.startswith(f"{copy} is sound")
    assert f"{never / MANIFEST} is missing" in error and f"{other / 'state.json'} is damaged" in error
    assert error.index(never.name) < error.index(other.name), "the newest first"


@pytest.mark.parametrize("name", ["none", "step-00000004", "empty"])
def test_where_there_is_none_a_sentence_says_so(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["verify", f"checkpoint={tmp_path / name}"]) == 2
    assert f"checkpoint={tmp_path / name} " in capfd.readouterr().err
