"""What is installed runs: a wheel with its tree of settings and its command, whatever lies in the working folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What pip writes for an entry point.
COMMAND = "import sys\nfrom {module} import {name}\nif __name__ == '__main__':\n    sys.exit({name}())\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like site-packages with nothing but the wheel's contents."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("train", "parallel", "launch", "kernels", "configs"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / "source" / name)
    build = "import sys, setuptools.build_meta as build; build.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=folder / "source", check=True, capture_output=True, text=True
    )
    (wheel,) = folder.glob("halocline-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site-packages")
    shutil.rmtree(folder / "source")
    (info,) = (folder / "site-packages").glob("halocline-*.dist-info")
    scripts = ConfigParser()
    scripts.read_string((info / "entry_points.txt").read_text())
    for command, place in scripts["console_scripts"].items():
        module, name = place.split(":")
        (folder / command).write_text(COMMAND.format(module=module, name=name))
    return folder / "site-packages"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A working folder with files of the names that the program imports and reads."""
    for name in ("train", "launch", "parallel", "kernels"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the working folder was imported')\n")
    (tmp_path / "configs" / "model").mkdir(parents=True)
    (tmp_path / "configs" / "run.yaml").write_text("a: 1\n")
    return tmp_path


def halocline(installed: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The installed command: a script of another folder, so that the working folder is not on its path."""
    return subprocess.run(
        [sys.executable, str(installed.parent / "halocline"), *words],
        env={**os.environ, "PYTHONPATH": str(installed)},
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def test_a_wheel_has_every_file(installed: Path) -> None:
    for name in ("train", "parallel", "launch", "kernels", "configs"):
        ours = {
            path.relative_to(ROOT) for suffix in ("py", "yaml", "cpp") for path in (ROOT / name).rglob(f"*.{suffix}")
        }
        assert ours and all((installed / path).exists() for path in ours)


def test_it_composes_its_own_tree(installed: Path, hostile: Path) -> None:
    from train import compose

    result = halocline(installed, hostile, "config", "model=small")
    assert result.returncode == 0, result.stderr
    assert result.stdout == compose.text(compose.compose(["model=small"]))
    assert halocline(installed, hostile, "--help").stdout.startswith("usage: halocline VERB")
    assert halocline(installed, hostile, "config", "model=smal").returncode == 2


def test_its_ranks_are_its_own(installed: Path, hostile: Path) -> None:
    """Those of a job that it starts, and one that a launcher would start."""
    (hostile / "text.txt").write_text("A few words, again and again.\n" * 4000)
    words = ["data.source=text.txt", "model.vocab_size=300", "model.num_hidden_layers=2", "train.seq_len=32"]
    words += ["train.max_steps=1", "evaluate.num_sequences=2", "track.wandb=disabled", "zero.engine=native"]
    for verb, said in (("local", "done after step 1"), ("train", "this run is done after step 1")):
        result = halocline(installed, hostile, verb, *words, "run.dir=run")
        assert result.returncode == 0 and said in result.stdout, result.stderr
