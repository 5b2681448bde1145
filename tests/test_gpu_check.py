"""The check of a GPU (docs/gpu_check.md), on a CPU: that its parts find what they are to find, and that nothing of one
keeps the next one from running."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_check import layers, machine, peer, table, training
from benchmarks.gpu_check.__main__ import PARTS, main
from benchmarks.gpu_check.table import FAILED, OK, Found, Row
from tests.spawn import STOP_S
from train.model.attention.choice import CORES

ROOT = Path(__file__).resolve().parent.parent
# What a machine with torch, Triton and transformers alone does not have, and no part of the check may need.
ABSENT = ("deepspeed", "wandb", "matplotlib", "tensorboard", "transformer_engine", "datasets", "pyarrow", "optuna")


def test_a_table_has_every_finding_and_every_end(tmp_path: Path) -> None:
    rows = [Row("loss", 2.0, "nats", 2.5, "CPU", OK), Row("who | multiplies", "nobody", note="a\nreason")]
    parts = {"one": Found(rows, 3.2), "two": Found([], 60.0, "not to its end: longer than 60 s")}
    assert not table.write(tmp_path, {"device": "cpu"}, parts)
    text = (tmp_path / "gpu-check.md").read_text()
    assert "| one | loss | 2 nats | 2.5 nats CPU | 0.80 | ok |  |" in text
    assert "| one | who \\| multiplies | nobody |  |  |  | a reason |" in text
    assert "| two | the part itself | 60 s |  |  | FAILED | not to its end: longer than 60 s |" in text
    body = json.loads((tmp_path / "gpu-check.json").read_text())
    assert body["parts"]["one"]["rows"][0]["beside"] == 2.5
    assert table.write(tmp_path, {}, {"one": Found(rows, 3.2)})
    assert not table.write(tmp_path, {}, {"one": Found([Row("loss", verdict=FAILED)], 3.2)})


def test_all_parts_fit_into_eight_minutes() -> None:
    assert sum(limit_s for _, limit_s in PARTS.values()) <= 480
    page = (ROOT / "docs" / "gpu_check.md").read_text()
    assert all(f"| `{name}` | {limit_s} s |" in page for name, (_, limit_s) in PARTS.items())


def test_a_part_that_does_not_end_or_breaks_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One is ended before it can have begun; another one is given a cluster that is none."""
    assert main(["device=cpu", f"out={tmp_path}", "parts=machine", "patience=0.001"]) == 1
    assert "longer than 0 s" in (tmp_path / "gpu-check.md").read_text()
    assert main(["device=cpu", f"out={tmp_path}", "parts=slice-bf16", "cluster=atlantis", "patience=9"]) == 1
    assert "not to its end: ValueError: cluster=atlantis" in (tmp_path / "gpu-check.md").read_text()
    assert "written: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="parts=slices is not one of machine, slice-bf16"):
        main(["parts=slices"])


def test_the_machine_says_what_it_would_take() -> None:
    found = {row.what: row for row in machine.rows("cpu")}
    assert found["run.attention_kernel=auto, one text"].value == "torch"
    assert {f"attention by {name} for V3's heads, documents" for name in CORES} <= found.keys()


def test_losses_are_held_against_a_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of the small model are the same here on both sides; what is off by a tenth of a nat is seen."""
    near, gained = training.precision("bf16", "cpu", num_steps=2)
    assert near.verdict == gained.verdict == OK and near.value == near.beside and near.beside_what == "CPU"
    curves = [[6.0, 5.0], [6.0, 5.1]]
    monkeypatch.setattr(training, "losses", lambda *_: curves.pop(0))
    assert next(training.precision("bf16", "cpu", num_steps=2)).verdict == FAILED


@pytest.mark.slow
def test_the_slice_has_every_node_beside_its_plan() -> None:
    rows = {row.what: row for row in layers.rows("small", "bf16", "cpu", "h100")}
    for node in ("attention", "experts"):
        for kind in "FBW":
            row = rows[f"MoE {node} {kind} in bf16"]
            assert isinstance(row.value, float) and row.value > 0 and (row.beside or 0) > 0, row
    for kind in "FBW":
        nodes = [row for name, row in rows.items() if name.endswith(f" {kind} in bf16") and "layer" not in name]
        assert rows[f"MoE layer {kind} in bf16"].beside == pytest.approx(sum(row.beside or 0.0 for row in nodes))


@pytest.mark.slow
def test_transformers_finds_the_same_loss() -> None:
    loss, seconds = peer.rows("small", "cpu")
    assert loss.verdict == OK and seconds.beside_what == "transformers"


@pytest.mark.slow
def test_the_whole_check_where_there_is_little(tmp_path: Path) -> None:
    """As a command, without the libraries that a GPU's machine need not have."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {ABSENT}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "benchmarks.gpu_check", "device=cpu", f"out={tmp_path / 'found'}", "patience=20"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=4 * STOP_S)
    assert done.returncode == 0, (tmp_path / "found" / "gpu-check.md").read_text() + done.stderr
    body = json.loads((tmp_path / "found" / "gpu-check.json").read_text())
    assert list(body["parts"]) == list(PARTS)
    assert all(part["rows"] and not part["ended"] for part in body["parts"].values())
