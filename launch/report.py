"""`python -m launch report run=DIR [run=DIR ...] [out=FILE]`: runs as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from launch.settings import ReportSettings
from train import compose
from train.checkpoint.goes_on import read_state
from train.checkpoint.step_folders import CONFIG_FILE, find_checkpoint, run_of
from train.data.rows.blend import prepared_fingerprint
from train.data.rows.valid import open_validation
from train.settings import read
from train.view.report.page import write_report
from train.view.report.runs import find_runs, read_run


def report(settings: Sequence[str]) -> int:
    """Write the page of these runs, whatever they stand at. A sweep's folder means all its jobs, a checkpoint its run.

    One run's page goes to its own folder, a sweep's to the sweep's, that of several to `report.html` here, unless
    `out` says where. ValueError for another setting, or a folder without a run.
    """
    given = read(ReportSettings, settings, "report")
    folders = [run_of(folder) for folder in given.run]
    runs = [read_run(path) for folder in dict.fromkeys(folders) for path in find_runs(folder)]
    out = given.out or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
    entropies = {unigram_entropy_nats(run.folder) for run in runs}
    write_report(runs, out, entropies.pop() if len(entropies) == 1 else None)
    print(f"report of {len(runs)} run{'s' if len(runs) > 1 else ''}: {out}")
    return 0


def unigram_entropy_nats(run: Path) -> float | None:
    """Unigram entropy of the validation text that a run reads, in nats per token.

    None where that is not known any more: without config, checkpoint or data, or with data that were prepared anew.
    """
    try:
        config = compose.load(run / CONFIG_FILE)
        known = read_state(find_checkpoint(run, "run")).fingerprints["data"]
        if prepared_fingerprint(config.data) not in known:
            return None
        return open_validation(config.data, config.train.seq_len, config.evaluate.num_sequences).unigram_entropy_nats
    except (OSError, ValueError, yaml.YAMLError):
        return None
