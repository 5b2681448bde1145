"""A queued job's own folder: the code and the resolved config that it will run, whatever becomes of the checkout."""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict
from pathlib import Path

import yaml

from launch.slurm.config import SlurmConfig
from train import compose
from train.config import RunConfig
from train.files import CRC32, refusing, sync, write_durably

# Where the packages of this program and their settings lie, in a checkout and where a wheel is installed.
PROGRAM = Path(__file__).resolve().parents[2]
PACKAGES = ("launch", "train", "parallel", "kernels", "configs")
CODE, CONFIG, SETTINGS, SCRIPT, LOG = "code", "config.yaml", "slurm.yaml", "job.sh", "job.log"


def make_job_folder(config: RunConfig, slurm: SlurmConfig) -> Path:
    """`<run.dir>/jobs/0001` and so on, absolute: a new folder with the code and the config in it.

    Each time a run is queued it gets a folder of its own, so that what is queued already stays as it was.

    Raises ValueError when it cannot be written.
    """
    jobs = Path(config.run.dir).absolute() / "jobs"
    with refusing(f"run.dir={config.run.dir}"):
        jobs.mkdir(parents=True, exist_ok=True)
        folder = _next(jobs)
        for name in PACKAGES:
            if (PROGRAM / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
                shutil.copytree(PROGRAM / name, folder / CODE / name, ignore=ignored)
        write_durably(folder / CONFIG, compose.text(config).encode(), CRC32)
        write_durably(folder / SETTINGS, yaml.safe_dump(asdict(slurm)).encode(), CRC32)
        sync(folder)
    return folder


def _next(jobs: Path) -> Path:
    """A folder whose number nobody else has, also where two are queued at once."""
    while True:
        numbers = [int(path.name) for path in jobs.iterdir() if re.fullmatch(r"\d+", path.name)]
        folder = jobs / f"{max(numbers, default=0) + 1:04d}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
