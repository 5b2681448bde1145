"""`python -m launch slurm key=value [slurm.nodes=N slurm.time=... submit=false]`: a run as a job of Slurm."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.job import check_folders
from launch.slurm.config import SlurmConfig, split
from launch.slurm.grace import sentence_before, write_rate
from launch.slurm.script import script
from launch.slurm.snapshot import SCRIPT, make_job_folder
from train import compose
from train.config import RunConfig
from train.files import refusing


def slurm(settings: Sequence[str]) -> int:
    """Check the run, copy what it is made of into its folder, write its script and queue it; 0 once it is queued.

    Raises ValueError, before anything is written, for settings that cannot be, for a run that does not fit, and where
    there is no Slurm.
    """
    own, submission, rest = split(settings)

    def start(config: RunConfig) -> int:
        own.check_for(config)
        if submission.submit and shutil.which("sbatch") is None:
            raise ValueError("there is no sbatch here, so nothing can be queued: submit=false shows what would be")
        config.track.check_installed()
        check_folders(config)
        _check_fits(config, own.plan)
        said = _about_saves(config, own)
        folder = make_job_folder(config, own)
        text = script(config, own, folder, Path.cwd())
        (folder / SCRIPT).write_text(text)
        (folder / SCRIPT).chmod(0o755)
        if not submission.submit:
            print(text)
        print(said)
        print(f"its script, its code and its config: {folder}")
        if submission.submit:
            _report(submit(folder / SCRIPT, own.chain), folder)
        return 0

    return compose.started(rest, start)


def _check_fits(config: RunConfig, cluster: str | None) -> None:
    if cluster is not None:
        # Not above: planning needs torch.
        from launch.sweep.fits import Fits

        Fits(cluster, "slurm.plan").check(config)


def _about_saves(config: RunConfig, own: SlurmConfig) -> str:
    """Whether a save fits before the end of a job."""
    folder = config.checkpoint.folder(config.run.dir)
    with refusing(f"checkpoint.dir={folder}"):
        return sentence_before(config, own.signal_s, write_rate(folder))


def submit(path: Path, num_jobs: int) -> list[str]:
    """Queue a script, as a chain of jobs of which each waits for the end of the one before; their ids.

    Raises ValueError, with what sbatch says, where it refuses. Jobs of the chain that are queued already are cancelled.
    """
    jobs: list[str] = []
    for _ in range(num_jobs):
        behind = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        command = ["sbatch", "--parsable", *behind, str(path)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            if jobs:
                with contextlib.suppress(OSError):
                    subprocess.run(["scancel", *jobs], capture_output=True)
            words = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            raise ValueError(f"sbatch has refused {path}: {words}")
        if done.stderr.strip():
            print(done.stderr.strip(), file=sys.stderr)
        jobs.append(done.stdout.strip().split(";")[0])
    return jobs


def _report(jobs: Sequence[str], folder: Path) -> None:
    print(f"queued as job {', '.join(jobs)}; what it says: {folder / 'job.log'}; to end it: scancel {' '.join(jobs)}")
