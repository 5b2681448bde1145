"""`run.deterministic`: changes no bit on a CPU, leaves torch as it was, and refuses in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.runs import SMALL, prepare_text, read_checkpoint, train_main
from train.deterministic import CUBLAS, NCCL_ALGO, check_variables, deterministic
from train.track.metrics_file import read_metrics


def state() -> tuple[object, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cuda.cudnn_sdp_enabled(),
    )


def test_on_a_cpu_it_changes_no_bit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text, before = prepare_text(tmp_path / "tokens"), state()
    torch.set_num_threads(1)
    settings = [*SMALL, *text, "train.max_steps=2", "evaluate.interval=2", "precision=bf16"]
    found = []
    for word in ("false", "true"):
        folder = tmp_path / word
        assert train_main([*settings, f"run.deterministic={word}", f"run.dir={folder}"]) == 0
        assert state() == before
        rows = read_metrics(folder / "metrics.jsonl")
        kept = [{key: row[key] for key in row if key.startswith(("train/", "valid/", "moe/"))} for row in rows]
        found.append((kept, read_checkpoint(folder / "checkpoints" / "step-00000002")))
    (rows, tensors), (again, same) = found
    assert rows == again and tensors.keys() == same.keys()
    assert all(torch.equal(tensors[name], same[name]) for name in tensors)


def test_inside_torch_is_told_and_afterwards_as_it_was() -> None:
    before = state()
    with deterministic(True):
        assert state() == (True, False, False, False)
    assert state() == before
    with deterministic(False):
        assert state() == before


def test_an_operation_without_another_way_is_a_sentence() -> None:
    before = state()
    sentence = r"^run\.deterministic=true: put_ .*; leave run\.deterministic=false$"
    with pytest.raises(ValueError, match=sentence), deterministic(True):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    assert state() == before
    with pytest.raises(RuntimeError, match="of another kind"), deterministic(True):
        raise RuntimeError("of another kind")


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({CUBLAS: ":8:8"}, f"{CUBLAS}=:8:8 is not one of :4096:8, :16:8"),
        ({NCCL_ALGO: "Ring,NVLS"}, f"{NCCL_ALGO}=Ring,NVLS asks for sums inside a switch"),
    ],
)
def test_what_the_environment_asks_otherwise_is_refused(variables: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_variables(variables)


def test_what_the_environment_leaves_open_is_set() -> None:
    for allowed in ({}, {CUBLAS: ":16:8"}, {NCCL_ALGO: "^NVLS,NVLSTree"}):
        environ = dict(allowed)
        check_variables(environ)
        assert environ == {CUBLAS: ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", **allowed}
