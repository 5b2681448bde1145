"""docs/extend.md is true: every walk is taken with the code as it stands on the page, and keeps its promise."""

from __future__ import annotations

import contextlib
import functools
import lzma
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from launch.__main__ import main
from parallel.pipeline import registry
from parallel.pipeline.simulate import Costs, simulate
from parallel.pipeline.verify import verify
from tests.runs import SMALL, prepare_text, relative, run_in
from tests.spawn import Ranks
from tests.train.model_cases import TINY, build
from train.data.config import DataConfig
from train.data.prepare.one_source import prepare
from train.model.loss import LossTerms

PAGE = Path(__file__).resolve().parent.parent / "docs" / "extend.md"


def code(title: str) -> str:
    """The block of Python under a heading of the page."""
    (section,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    (block,) = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
    return str(block)


@contextlib.contextmanager
def walk(title: str) -> Iterator[types.ModuleType]:
    """Inside, the page's code has run as a module of its own, and what it registered is there."""
    from launch import __main__ as launch_main
    from train.data.read import streams
    from train.model.attention import choice, installed
    from train.recipe import optimizer, phases

    registries = (registry.FAMILIES, optimizer.OPTIMIZERS, streams.OPENERS, phases.SHAPES, launch_main.VERBS)
    registries += (choice.CORES, installed.MAKERS)
    before = [dict(each) for each in registries]
    name = re.sub(r"\W", "_", title)
    sys.modules[name] = module = types.ModuleType(name)
    try:
        exec(compile(code(title), f"{PAGE}: {title}", "exec"), module.__dict__)
        yield module
    finally:
        for each, old in zip(registries, before, strict=True):
            each.clear()
            each.update(old)  # type: ignore[arg-type]
        del sys.modules[name]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepare_text(tmp_path_factory.mktemp("text") / "tokens")


def test_a_phase_of_the_learning_rate() -> None:
    from train.compose import compose

    settings = ["lr_scheduler.phases=[{kind: one_minus_sqrt, end_lr: 0.0}]", "lr_scheduler.warmup_steps=0"]
    with pytest.raises(ValueError, match="one_minus_sqrt"):
        compose(settings)
    with walk("A phase of the learning rate"):
        recipe = compose([*settings, "lr_scheduler.lr=1.0", "train.max_steps=4", "train.max_tokens=null"]).recipe()
        assert [recipe.at(step).lr for step in range(4)] == pytest.approx([1 - (step / 4) ** 0.5 for step in range(4)])


def test_a_pipeline_schedule(ranks: Ranks, tmp_path: Path, text: list[str]) -> None:
    """Its gradients are those of one process, and its bubble GPipe's: (P - 1)(F + D)."""
    title = "A pipeline schedule"
    with walk(title):
        schedule = registry.build("gpipe", 4, 6)
        verify(schedule)
        result = simulate(schedule, Costs(f=1.0, b=1.0, w=1.0))
        assert max(result.peak_activations) == 6
    settings = [*SMALL, *text, "precision=fp64", "train.max_steps=3"]
    alone = run_in(ranks, tmp_path / "alone", settings, 1)
    piped = run_in(
        ranks,
        tmp_path / "piped",
        [*settings, "parallel.pp=3", "pipeline.schedule=gpipe"],
        3,
        functools.partial(walk, title),
    )
    for ours, theirs in zip(piped.rows, alone.rows, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-9)


def test_an_optimizer(ranks: Ranks, tmp_path: Path, text: list[str]) -> None:
    """Sharded over ranks and stages it makes the weights of one process, momentum included."""
    settings = [*SMALL, *text, "precision=fp64", "train.max_steps=3", "optimizer.name=sgd"]
    fault = functools.partial(walk, "An optimizer")
    alone = run_in(ranks, tmp_path / "alone", settings, 1, fault).masters
    topology = ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "parallel.dispatch=flat"]
    spread = run_in(ranks, tmp_path / "spread", [*settings, *topology], 4, fault).masters
    assert alone.keys() == spread.keys() and any(name.startswith("momentum_buffer.") for name in alone)
    assert not any(name.startswith("exp_avg") for name in alone)
    for name, value in alone.items():
        assert relative(spread[name], value) < 1e-9, name


def test_a_metric_is_declared_as_shown() -> None:
    """The rest of this walk is tests/test_new_metric.py."""
    with walk("A metric") as module:
        assert module.largest.name == "moe/largest_load"


def test_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with walk("A verb"):
        assert main(["count", "model=tiny"]) == 0
        assert int(capsys.readouterr().out.replace(",", "")) > 1_000_000
        assert main(["count", "--help"]) == 0
        assert "file of configs/model" in capsys.readouterr().out
        assert main(["count", "modle=tiny"]) == 2
        assert "did you mean model" in capsys.readouterr().err


def test_a_source_of_text(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    words = "".join(f"line {number} of a text\n" for number in range(3000))
    (tmp_path / "text" / "a.txt.lzma").write_bytes(lzma.compress(words.encode(), lzma.FORMAT_ALONE))
    with walk("A source of text"):
        data = DataConfig(
            source=str(tmp_path / "text"),
            dir=str(tmp_path / "tokens"),
            vocab_size=300,
            max_document_bytes=4096,
            valid_fraction=0.2,
            num_workers=1,
        )
        meta = prepare(data, say=lambda line: None)
    assert meta.report["bytes"] == len(words)


def test_an_attention_kernel() -> None:
    from train.compose import compose
    from train.model.attention.installed import build_core
    from train.model.packing import ByDocument, OneText, Packing

    tokens = torch.arange(34).view(2, 17) % TINY.vocab_size

    def losses(name: str) -> torch.Tensor:
        core = build_core(name, compose([]).attention_demand, torch.device("cpu"))
        packings: list[Packing] = [OneText(core), ByDocument(5, core)]
        with torch.no_grad():
            return torch.stack([build(TINY, packing=each)(tokens, LossTerms(1.0, 0.3, 0.0)).total for each in packings])

    before = losses("auto")
    with pytest.raises(ValueError, match=r"run\.attention_kernel=plain is not one of auto, cudnn"):
        compose(["run.attention_kernel=plain"])
    with walk("An attention kernel"):
        compose(["run.attention_kernel=plain"])
        # In fp64, over sums of at most 17 products of numbers near 1, layer after layer.
        torch.testing.assert_close(losses("plain"), before, rtol=1e-10, atol=0)
