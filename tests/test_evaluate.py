"""Evaluation in a run and without one: the same numbers on every topology, nothing of the run touched by it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import main
from tests.deviation import worst
from tests.plain_run import plain_run
from tests.runs import SMALL, Finished, forget_after, last_checkpoint, prepare_text, run_in
from tests.spawn import Ranks
from tests.texts import Author
from train.compose import compose
from train.data.prepare.all_sources import prepare_sources
from train.track.metrics_file import Samples, read_samples
from train.view.report.runs import read_run

# A pipeline that runs both ways, with experts on other ranks.
FOUR = ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "parallel.dispatch=flat", "pipeline.schedule=dualpipe"]
STEPS = ["train.max_steps=4", "evaluate.interval=2", "evaluate.num_sequences=5", "optimizer.ema_decay=0.5"]
LOOKS = ["evaluate.at_start=true", "evaluate.prompts=[def get_,'    return',if]", "evaluate.prompt_tokens=6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def settings(folder: Path) -> list[str]:
    """A run with a text of its own that it is only evaluated on."""
    book = folder / "book.txt"
    author = Author(7)
    book.write_text("\n".join(author.sentence() for _ in range(300)))
    own = f"data.valid_sources=[{{name: book, source: {book}}}]"
    return [*SMALL, *prepare_text(folder / "tokens"), *STEPS, own, "precision=fp64", "data.document_mask=true"]


@pytest.fixture(scope="module")
def four(ranks: Ranks, folder: Path, settings: list[str]) -> Finished:
    return run_in(ranks, folder / "four", [*settings, *LOOKS, *FOUR], 4)


@pytest.fixture(scope="module")
def one(ranks: Ranks, folder: Path, settings: list[str]) -> Finished:
    return run_in(ranks, folder / "one", [*settings, *LOOKS], 1)


def samples(run: Finished) -> list[Samples]:
    return read_samples(run.folder / "samples.jsonl")


def report_of(tmp_path: Path, *words: str) -> dict[str, Any]:
    """What `launch evaluate` writes."""
    assert main(["evaluate", f"out={tmp_path / 'found.json'}", *words]) == 0
    return json.loads((tmp_path / "found.json").read_text())


def test_every_source_has_one_plain_processs_loss_on_any_topology(
    one: Finished, four: Finished, settings: list[str]
) -> None:
    assert [row["step"] for row in four.rows] == [0, 1, 2, 3, 4]
    evaluated = {row["step"]: row for row in four.rows if "valid/loss" in row}
    assert list(evaluated) == [0, 2, 4] and all("valid/book/loss" in row for row in evaluated.values())
    # Before the first step a model of this initialisation guesses.
    assert evaluated[0].keys() == {"step", "train/consumed_tokens", "valid/loss", "valid/book/loss"}
    assert evaluated[0]["valid/loss"] == pytest.approx(math.log(300), rel=0.02)
    plain = plain_run(compose(settings))
    for run in (one, four):
        assert worst(Finished(run.folder, run.rows[1:]), plain) < 1e-9
    for name in ("valid/loss", "valid/book/loss"):
        assert four.rows[0][name] == pytest.approx(one.rows[0][name], rel=1e-12)


def test_prompts_go_on_alike_on_any_topology(one: Finished, four: Finished) -> None:
    found = samples(four)
    assert found == samples(one) and [each.step for each in found] == [0, 2, 4]
    assert [each.prompt for each in found[0].samples] == ["def get_", "    return", "if"]
    assert any(each.text for each in found[-1].samples)


def test_prompts_go_on_as_generate_does(four: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over caches, in one process; texts of one document, which no end of one has cut."""
    for sample in samples(four)[-1].samples:
        capsys.readouterr()
        assert main(["generate", f"checkpoint={four.folder}", f"prompt={sample.prompt}", "max_new_tokens=6"]) == 0
        assert f"\n\n{sample.prompt}{sample.text}\n\nprompt " in capsys.readouterr().out


def test_looking_changes_nothing(ranks: Ranks, tmp_path: Path, settings: list[str], one: Finished) -> None:
    """The run without it has the same numbers and the same last checkpoint, bit for bit, random numbers included."""
    plain = run_in(ranks, tmp_path / "plain", settings, 1)
    for ours, theirs in zip(one.rows[1:], plain.rows, strict=True):
        for name in ours.keys() | theirs.keys():
            if name.startswith(("train/", "moe/", "valid/")):
                assert ours[name] == theirs[name], name
    masters, others = one.masters, plain.masters
    assert all(masters[name].equal(others[name]) for name in others)
    rng = [json.loads((last_checkpoint(run.folder) / "state.json").read_text())["rng"] for run in (one, plain)]
    assert rng[0] == rng[1]
    assert not (plain.folder / "samples.jsonl").exists()


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_the_verb_finds_what_the_run_has_found(four: Finished, tmp_path: Path, weights: str) -> None:
    found = report_of(tmp_path, f"checkpoint={four.folder}", f"weights={weights}")
    last = four.rows[-1]
    losses = [found["loss"], found["sources"]["library"]["loss"], found["sources"]["book"]["loss"]]
    is_same = losses == pytest.approx([last["valid/loss"], last["valid/loss"], last["valid/book/loss"]], rel=1e-12)
    assert is_same == (weights == "model"), "the average of the weights is another model"
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-12)
    assert (found["step"], found["precision"], found["num_sequences"]) == (4, "fp64", 5)


def test_one_process_is_found_again_to_the_bit(one: Finished, tmp_path: Path) -> None:
    found, last = report_of(tmp_path, f"checkpoint={one.folder}"), one.rows[-1]
    assert (found["loss"], found["sources"]["book"]["loss"]) == (last["valid/loss"], last["valid/book/loss"])


def test_any_text_is_evaluated_on(
    four: Finished, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint, book = f"checkpoint={four.folder}", folder / "book.txt"
    some = report_of(tmp_path, checkpoint, f"data.source={book}")
    assert some["loss"] == pytest.approx(four.rows[-1]["valid/book/loss"], rel=1e-12), "the same text, whole"
    own = report_of(tmp_path, checkpoint, f"data.valid_sources=[{{name: again, source: {book}}}]")
    assert own["sources"].keys() == {"again"} and own["loss"] == some["loss"]
    capsys.readouterr()
    whole = report_of(tmp_path, checkpoint, f"data.source={book}", "num_sequences=all")
    assert whole["num_sequences"] > 20 and whole["loss"] != some["loss"]
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("book "))
    assert row.split()[1:] == [
        f"{whole['num_sequences']:,}", f"{whole['num_targets']:,}", f"{whole['loss']:.6f}", f"{whole['perplexity']:.4f}"
    ]  # fmt: skip
    prepared = report_of(tmp_path, checkpoint, f"data.dir={folder / 'tokens'}", "precision=fp32")
    assert prepared["loss"] == pytest.approx(four.rows[-1]["valid/loss"], rel=1e-5)
    short = report_of(tmp_path, checkpoint, f"data.source={book}", "seq_len=8", "num_sequences=3")
    assert (short["seq_len"], short["num_sequences"]) == (8, 3)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["data.dir={other}"], "was prepared with another tokenizer than the run's"),
        (["data.suffixes=[.py]"], "data.suffixes=[.py] says how a text is read, and there is none"),
        (["data.sorce=x"], "data.sorce is not a key of the config; did you mean data.source"),
        (["data.source=/nowhere"], "/nowhere"),
        (["num_sequences=some"], "num_sequences=some must be a whole number of at least 1, or all"),
        (["seq_len=100000"], "seq_len=100000 is above model.max_position_embeddings"),
        (["weights=mean"], "weights=mean is not one of model, ema"),
        (["train.seq_len=3"], "train.seq_len is not a key of evaluate"),
    ],
)
def test_the_verb_refuses_in_a_sentence(
    four: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    other = tmp_path / "other"
    if "other" in words[0]:
        (tmp_path / "text.txt").write_text("".join(f"other words {number}\n" for number in range(300)))
        data = compose([f"data.source={tmp_path / 'text.txt'}", f"data.dir={other}", "data.max_document_bytes=64"]).data
        prepare_sources(data, lambda line: None)
    capsys.readouterr()
    assert main(["evaluate", f"checkpoint={four.folder}", *(word.format(other=other) for word in words)]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and not captured.out


# --- patience ---

# So slow that no evaluation improves by as much.
STUCK = ["lr_scheduler.lr=1e-9", "evaluate.interval=1", "evaluate.patience=2", "evaluate.min_improvement=0.01"]


def test_a_run_that_does_not_improve_ends_early_and_goes_on_from_a_kill_exactly(
    ranks: Ranks, tmp_path: Path, settings: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    stuck = [*settings, *STUCK, "checkpoint.interval=1", "checkpoint.keep_latest_k=0"]
    run = run_in(ranks, tmp_path / "run", stuck, 1)
    assert [row["step"] for row in run.rows] == [1, 2, 3]
    standing = read_run(run.folder).standing
    assert standing.startswith("done after step 3 of 4, as the validation loss has not improved on 5.")
    # Killed between two evaluations of the two that it was patient for.
    shutil.copytree(run.folder, tmp_path / "killed")
    forget_after(tmp_path / "killed", 2)
    again = run_in(ranks, tmp_path / "killed", stuck, 1)
    assert [row["valid/loss"] for row in again.rows] == [row["valid/loss"] for row in run.rows]
    assert last_checkpoint(again.folder).name == "step-00000003"
    # The same command once more: nothing is left to do. With more patience it goes on.
    before = (again.folder / "metrics.jsonl").read_bytes()
    run_in(ranks, again.folder, stuck, 1)
    assert (again.folder / "metrics.jsonl").read_bytes() == before
    longer = run_in(ranks, again.folder, [*stuck, "evaluate.patience=9"], 1)
    assert [row["step"] for row in longer.rows] == [1, 2, 3, 4]
