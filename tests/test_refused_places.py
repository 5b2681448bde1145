"""What this machine refuses (folders, files, variables, devices) is one sentence and exit code 2, in every verb."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launch.__main__ import main
from tests.runs import SMALL, prepare_text
from train import compose, environment
from train.__main__ import main as train_main
from train.device import uses_cuda
from train.settings import check_fits

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepare_text(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture(scope="module")
def read_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system that refuses to be written, also by root."""
    place = tmp_path_factory.mktemp("read-only")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=64k", "none", place], stderr=-3).returncode:
        pytest.skip("only root may mount a file system")
    yield place
    subprocess.run(["umount", place], check=True)


def places(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Folders that cannot be made, and what the system says of them."""
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at" / "all")
    return {
        "a file": (tmp_path / "file", "exists|is no folder|Not a directory"),
        "below a file": (tmp_path / "file" / "below", "Not a directory"),
        "a name too long": (tmp_path / ("x" * 300), "name too long"),
        "a dangling link": (tmp_path / "dangling", "dangling|exists|No such file"),
    }


def refused(capsys: pytest.CaptureFixture[str], words: list[str], rank: bool = False) -> str:
    """The sentence of a call that ends with exit code 2; nothing else is said on standard error."""
    capsys.readouterr()
    code = train_main(words) if rank else main(words)
    said = capsys.readouterr().err
    assert (code, said.count("\n")) == (2, 1), said
    return said.strip()


@pytest.mark.parametrize("key", ["run.dir", "checkpoint.dir"])
@pytest.mark.parametrize("kind", ["a file", "below a file", "a name too long", "a dangling link"])
def test_a_runs_folders(
    kind: str, key: str, tokens: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, why = places(tmp_path)[kind]
    words = [*SMALL, *tokens, f"run.dir={tmp_path / 'run'}", f"{key}={place}"]
    for rank in (True, False):
        said = refused(capsys, words if rank else ["local", *words], rank)
        assert said.startswith(f"{key}={place} cannot be written: "), said
        assert any(each in said for each in why.split("|")), said


def test_a_read_only_disk(
    read_only: Path, tokens: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for key in ("run.dir", "checkpoint.dir"):
        place = read_only / "new"
        words = [*SMALL, *tokens, f"run.dir={tmp_path / key}", f"{key}={place}"]
        for rank in (True, False):
            said = refused(capsys, words if rank else ["local", *words], rank)
            assert said.startswith(f"{key}={place} cannot be written: Read-only file system"), said
    said = refused(capsys, ["prepare", tokens[0], f"data.dir={read_only / 'tokens'}"])
    assert str(read_only / "tokens") in said and "Read-only file system" in said


@pytest.mark.parametrize("kind", ["a file", "below a file", "a name too long", "a dangling link"])
def test_what_verbs_write(kind: str, tokens: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, _ = places(tmp_path)[kind]
    said = refused(capsys, ["prepare", tokens[0], "data.suffixes=[.py]", f"data.dir={place}"])
    assert str(place) in said
    if kind == "a file":  # which a picture may replace
        return
    out = place / "out.svg"
    for words in (
        ["timeline", "pipeline.schedule=1f1b", "parallel.pp=2", "pipeline.num_micro_batches=4", f"out={out}"],
        ["schedule", *SMALL, f"out={out}"],
    ):
        assert str(place) in refused(capsys, words)


@pytest.mark.parametrize("kind", ["a file", "below a file", "a name too long", "a dangling link"])
def test_what_verbs_read(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, _ = places(tmp_path)[kind]
    for words in (
        ["report", f"run={place}", f"out={tmp_path / 'report.html'}"],
        ["generate", f"checkpoint={place}", "prompt=x"],
        ["export", f"checkpoint={place}", f"to={tmp_path / 'model'}"],
        ["import", f"from={place}", f"to={tmp_path / 'model'}"],
        ["prepare", f"data.source={place}", f"data.dir={tmp_path / 'tokens'}"],
        ["config", "--config", str(place)],
    ):
        if (kind, words[0]) != ("a file", "prepare"):  # an empty file is a source, in words of its own
            assert str(place) in refused(capsys, words), words


# --- variables, devices, compilers ---


@pytest.mark.parametrize(
    ("variables", "phrase"),
    [
        ({"RANK": ""}, "RANK='' must be a whole number of at least 0"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc must be a whole number of at least 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 must be"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 must be"),
        ({"LOCAL_WORLD_SIZE": "1.5"}, "LOCAL_WORLD_SIZE=1.5 must be"),
        ({"OMP_NUM_THREADS": "abc"}, "OMP_NUM_THREADS=abc must be"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536 must be a whole number from 1 to 65535"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set but RANK is not"),
        ({"MASTER_ADDR": "localhost"}, "MASTER_ADDR=localhost is set but RANK is not"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK=1 must be below WORLD_SIZE=1"),
        ({"WANDB_MODE": "ofline"}, "WANDB_MODE=ofline is not one of"),
    ],
)
def test_variables_of_the_environment(
    variables: dict[str, str], phrase: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert phrase in refused(capsys, [*SMALL], rank=True)


def test_variables_that_are_well() -> None:
    assert environment.read({}) == environment.Environment()
    assert environment.read({"OMP_NUM_THREADS": "4,2"}).num_threads == 4
    assert environment.read({"OMP_NUM_THREADS": "", "MASTER_ADDR": ""}) == environment.Environment()
    assert (
        environment.speaks({})
        and environment.speaks({"LOCAL_RANK": ""})
        and not environment.speaks({"LOCAL_RANK": "1"})
    )


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^run\.device=cuda: .*; use cpu, or auto"):
        uses_cuda("run.device", "cuda")
    assert not uses_cuda("run.device", "auto") and not uses_cuda("run.device", "cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert uses_cuda("device", "auto") and uses_cuda("device", "cuda")
    with pytest.raises(ValueError, match="2 ranks on this machine need as many GPUs, and torch finds 1"):
        uses_cuda("run.device", "auto", 2)


def test_no_compiler(
    tokens: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    words = [*SMALL, *tokens, "run.kernels=compiled", f"run.dir={tmp_path}"]
    for rank in (True, False):
        said = refused(capsys, words if rank else ["local", *words], rank)
        assert said.startswith("run.kernels=compiled needs a C++ compiler, and there is no no-such-compiler here")


# --- settings ---


@pytest.mark.parametrize(
    ("word", "phrase"),
    [
        ("train.seed=12345678901234567890", "train.seed=12345678901234567890 is too large"),
        ("data.blend=[{name: a, sorce: x, weight: 1}]", "did you mean"),
        ("run.name=${nothing}", "nothing"),
        ("run.name=${oc.env:NO_SUCH_VARIABLE_HERE}", "NO_SUCH_VARIABLE_HERE"),
    ],
)
def test_settings(word: str, phrase: str, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("config", "train", "local", "schedule"):
        assert phrase in refused(capsys, [verb, *SMALL, word])


def test_numbers_of_64_bits_fit() -> None:
    check_fits("train.seed", 2**63 - 1)
    with pytest.raises(ValueError, match="is too large"):
        check_fits("data.counts", [1, [2**63]])


@pytest.mark.parametrize("text", ["a${x}", r"\${x}", r"\\${x}", "${", "$x {y}", "${a.b:${c}}", "a\\"])
def test_a_resolved_config_with_references_in_it_is_read_back(text: str) -> None:
    """Ranks are handed the resolved text: a `${` that is left in it stands for itself."""
    config = compose.compose([*SMALL, r"run.name='price in \${dollars}'"])
    assert config.run.name == "price in ${dollars}"
    config = replace(config, track=replace(config.track, project=text, tags=[text, "b"]))
    assert compose.of_text(compose.text(config)) == config


def test_files_of_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content, phrase in (
        ("latin.yaml", b"run:\n  name: \xe9\n", "UTF-8"),
        ("broken.yaml", b"run: [1,\n", "YAML"),
        ("list.yaml", b"- 1\n", "list.yaml"),
        ("empty.yaml", b"", "empty.yaml"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        for verb in ("config", "local", "train"):
            said = refused(capsys, [verb, "--config", str(path)])
            assert phrase in said and str(path) in said, said


def test_settings_behind_a_file_are_laid_over_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    assert main(["config", *SMALL, "run.name=first"]) == 0
    path.write_text(capsys.readouterr().out)
    assert main(["config", "--config", str(path), "train.max_steps=7", "lr_scheduler.lr=0.5"]) == 0
    config = compose.of_text(capsys.readouterr().out)
    assert (config.train.max_steps, config.lr_scheduler.lr, config.run.name) == (7, 0.5, "first")
    for verb in ("config", "train", "local"):
        assert "max_stepz" in refused(capsys, [verb, "--config", str(path), "train.max_stepz=7"])


def test_no_file_of_a_user_is_left_behind(
    tokens: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that was asked whether it takes files holds none of the question."""
    refused(capsys, ["local", *SMALL, *tokens, f"run.dir={tmp_path / 'run'}", f"checkpoint.dir={os.devnull}"])
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
