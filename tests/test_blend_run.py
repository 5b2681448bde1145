"""A run over a blend, with a ramp, masks and repeats: any topology equals one plain process; other data are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deviation import worst
from tests.plain_run import plain_run
from tests.runs import SMALL, run_in
from tests.spawn import Ranks
from tests.texts import write_library
from train.compose import compose
from train.data.prepare.all_sources import prepare_sources

RUN = (
    *("train.global_batch_size=8", "train.batch_ramp.start=4", "train.batch_ramp.tokens=200"),
    *("train.batch_ramp.quantum=4", "train.max_steps=4", "precision=fp64", "model.num_nextn_predict_layers=2"),
    "data.document_mask=true",
)


def blend_of(folder: Path, *sources: str) -> list[str]:
    return [
        f"data.blend=[{','.join(sources)}]",
        f"data.dir={folder}",
        *("data.vocab_size=300", "data.valid_fraction=0.3", "data.max_document_bytes=64"),
    ]


def source(folder: Path, name: str, weight: float, settings: str = "") -> str:
    """A library of its own for each name, beside the folder of the tokens."""
    library = write_library(folder.with_name(name), seed=len(name), num_files=8)
    return f"{{name:{name},weight:{weight},source:{library},settings:{{suffixes:[.py]{settings}}}}}"


def last_words(folder: Path) -> str:
    """Why rank 0 ended."""
    return (folder / "logs" / "rank_0.log").read_text().splitlines()[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blend") / "tokens"


@pytest.fixture(scope="module")
def text(folder: Path) -> list[str]:
    settings = blend_of(folder, source(folder, "json", 0.7), source(folder, "wsgiref", 0.3, ",fim_rate:0.5"))
    prepare_sources(compose([*SMALL, *settings]).data, lambda line: None)
    return settings


TOPOLOGIES = [
    (1, "train.micro_batch_size=2"),
    (2, "parallel.pp=2 parallel.dp=1 pipeline.schedule=dualpipev recompute.mla_up_proj=true"),
    pytest.param(4, "parallel.dp=4 parallel.ep=2 parallel.dispatch=flat", marks=pytest.mark.slow),
    pytest.param(2, "parallel.pp=2 parallel.dp=1 pipeline.schedule=zbv", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world_size", "settings"), TOPOLOGIES)
def test_a_blend_equals_one_plain_process(
    ranks: Ranks, tmp_path: Path, text: list[str], world_size: int, settings: str
) -> None:
    whole = [*SMALL, *text, *RUN, *settings.split()]
    run = run_in(ranks, tmp_path, whole, world_size)
    assert worst(run, plain_run(compose(whole))) < 1e-9


def test_a_checkpoint_goes_on_with_its_own_blend_alone(
    ranks: Ranks, tmp_path: Path, folder: Path, text: list[str]
) -> None:
    # A constant rate: no border of the recipe depends on where the run ends.
    free = ["evaluate.interval=0", "lr_scheduler.phases=[]"]
    whole = [*SMALL, *text, *RUN, *free]
    run_in(ranks, tmp_path, [*whole, "train.max_steps=2", "checkpoint.interval=1"], 1)
    tokenizer = f"data.tokenizer={folder / 'tokenizer.json'}"
    others = {
        "data.blend": [
            *blend_of(folder, source(folder, "json", 0.6), source(folder, "wsgiref", 0.4, ",fim_rate:0.5")),
            tokenizer,
        ],
        "data.document_mask": [*text, "data.document_mask=false"],
    }
    for key, data in others.items():
        run_in(ranks, tmp_path, [*SMALL, *RUN, *data, *free], 1, exit_code=2)
        said = last_words(tmp_path)
        assert f"{key} was " in said and " there and is " in said, said
    run_in(ranks, tmp_path, whole, 1)


def test_too_many_epochs_are_refused_before_the_first_step(ranks: Ranks, tmp_path: Path, text: list[str]) -> None:
    run_in(ranks, tmp_path, [*SMALL, *text, *RUN, "data.max_epochs=0.001"], 1, exit_code=2)
    assert "data.max_epochs=0.001, and the run would see" in last_words(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
