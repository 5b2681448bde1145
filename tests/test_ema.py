"""The moving average of the weights: its recursion, its place in checkpoints, resumed and under another topology."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.runs import SMALL, Finished, prepare_text, read_checkpoint, relative, run_in, train_main
from tests.spawn import Ranks
from train.compose import compose
from train.model.init import init_weights
from train.model.transformer import Transformer
from train.precision.build import everywhere
from train.precision.torch_engine import TorchEngine
from train.recipe import ema as ema_module
from train.recipe.ema import Ema, Pinned

DECAY = 0.75
STEPS = ["train.max_steps=4", "checkpoint.interval=1", "checkpoint.keep_latest_k=0", f"optimizer.ema_decay={DECAY}"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepare_text(tmp_path_factory.mktemp("text") / "tokens")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, text: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("ema") / "single"
    torch.set_num_threads(1)
    assert train_main([*SMALL, *text, *STEPS, "precision=bf16", f"run.dir={folder}"]) == 0
    return folder


def at(folder: Path, step: int) -> dict[str, Tensor]:
    return read_checkpoint(folder / "checkpoints" / f"step-{step:08d}")


def initial(settings: list[str]) -> dict[str, Tensor]:
    """The weights before the first step, by name."""
    config = compose(settings)
    everything = SimpleNamespace(num_local_experts=config.model.n_routed_experts, first_expert=0)
    with torch.device("meta"):
        model = Transformer(config.model, everything, everywhere(TorchEngine()))
    init_weights(model, config.train.seed, torch.float32, "cpu")
    return {name: parameter.detach().float().flatten() for name, parameter in model.named_parameters()}


def check_recursion(folder: Path, before: dict[str, Tensor]) -> None:
    """Every average of every step, from the masters that the checkpoints hold, in float64."""
    averages = {name: value.double() for name, value in before.items()}
    for step in range(1, 5):
        states = at(folder, step)
        assert {name.split(".", 1)[1] for name in states if name.startswith("ema.")} == averages.keys()
        for name in averages:
            averages[name] = DECAY * averages[name] + (1 - DECAY) * states[f"master.{name}"].double()
            assert states[f"ema.{name}"].dtype == torch.float32
            assert relative(states[f"ema.{name}"], averages[name]) < 1e-6, (step, name)
    assert any(relative(states[f"ema.{name}"], states[f"master.{name}"]) > 1e-3 for name in averages)


def test_it_averages_what_every_step_made(single: Path, text: list[str]) -> None:
    check_recursion(single, initial([*SMALL, *text]))


def test_resumed_bit_for_bit(single: Path, tmp_path: Path, text: list[str]) -> None:
    folder = tmp_path / "again"
    shutil.copytree(single, folder)
    for step in (3, 4):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")
    assert train_main([*SMALL, *text, *STEPS, "precision=bf16", f"run.dir={folder}"]) == 0
    before, after = at(single, 4), at(folder, 4)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_it_is_sharded_as_the_masters_are(ranks: Ranks, tmp_path: Path, text: list[str]) -> None:
    settings = [*SMALL, *text, *STEPS, "precision=bf16", "parallel.dp=2", "parallel.ep=2", "parallel.dispatch=flat"]
    run: Finished = run_in(ranks, tmp_path, settings, 2)
    check_recursion(run.folder, initial([*SMALL, *text]))


@pytest.mark.parametrize("decay", ["0.0", "0.5"])
def test_a_run_goes_on_with_its_own_decay(
    single: Path, text: list[str], decay: str, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = [*SMALL, *text, *STEPS, "precision=bf16", f"run.dir={single}", "train.max_steps=5"]
    assert train_main([*settings, f"optimizer.ema_decay={decay}", "lr_scheduler.phases=[]"]) == 2
    assert "optimizer.ema_decay" in capfd.readouterr().err


def test_it_runs_beside_training_and_its_errors_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    master = torch.ones(70_000)
    ema = Ema({"master.w": [SimpleNamespace(offset=0, tensor=master)]}, 0.5)
    threads, update = [], ema._update
    monkeypatch.setattr(ema, "_update", lambda: (threads.append(threading.current_thread()), update()))
    master.fill_(3.0)
    ema.start()
    (average,) = ema.state()["ema.w"]
    assert threads[0] is not threading.main_thread()
    assert torch.equal(average.tensor, torch.full((70_000,), 2.0))
    monkeypatch.setattr(ema, "_update", lambda: 1 / 0)
    ema.start()
    with pytest.raises(ZeroDivisionError):
        ema.wait()
    ema.wait()


class Late(Pinned):
    """Copies that arrive when they are waited for, and not before; its buffers are those of a test's size."""

    def __init__(self) -> None:
        self.streams: list[object] = []
        super().__init__(torch.device("cpu"))

    def ready(self) -> None: ...

    def _new_stream(self, device: torch.device) -> Any:
        self.streams.append(device)
        return None

    def _new_home(self) -> Tensor:
        return torch.full((ema_module._STAGED,), torch.nan, dtype=torch.float64)

    def _copy(self, piece: Tensor, home: Tensor) -> Any:
        home.fill_(torch.nan)
        return SimpleNamespace(synchronize=lambda: home.copy_(piece))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pieces_of_a_device_come_through_two_buffers(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Nothing is read before it has arrived, nor overwritten before it was read; no start makes a stream."""
    monkeypatch.setattr(ema_module, "_STAGED", 7)
    monkeypatch.setattr(ema_module, "_CHUNK", 3)
    sizes = (1, 6, 7, 8, 14, 30)
    masters = {f"master.{n}": [SimpleNamespace(offset=0, tensor=torch.zeros(n, dtype=dtype))] for n in sizes}
    source = Late()
    ema = Ema(masters, 0.75, source)
    for step in (1, 2):
        for number, parts in enumerate(masters.values()):
            parts[0].tensor.copy_(torch.arange(parts[0].tensor.numel()) + 100 * number * step)
        ema.start()
        ema.wait()
    for number, (name, parts) in enumerate(masters.items()):
        (average,) = ema.state()[name.replace("master", "ema")]
        first = torch.arange(parts[0].tensor.numel(), dtype=dtype) + 100 * number
        torch.testing.assert_close(average.tensor, 0.75 * 0.25 * first + 0.25 * parts[0].tensor)
    assert len(source.streams) == 1
