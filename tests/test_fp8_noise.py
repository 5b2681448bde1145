"""One step of the same weights in several arithmetics: parts of FP8 add up to it, and every bad request is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import fp8_noise
from benchmarks._engines import MakeEngines, partly
from tests.runs import SMALL, last_checkpoint, prepare_text, train_main
from train import compose
from train.checkpoint.step_folders import CONFIG_FILE
from train.precision.build import build_engines
from train.precision.config import PrecisionConfig


def trained(folder: Path, precision: str) -> Path:
    """The last step folder of a run of two steps."""
    text = prepare_text(folder / "data")
    settings = [*SMALL, *text, "train.max_steps=2", "evaluate.interval=0", f"precision={precision}"]
    assert train_main([*settings, f"run.dir={folder / precision}"]) == 0
    return last_checkpoint(folder / precision)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("noise"), "fp8")


def test_parts_add_up(checkpoint: Path) -> None:
    config = compose.load(checkpoint / CONFIG_FILE)
    batches = [torch.arange(150).view(6, 25)]

    def step(precision: PrecisionConfig, make: MakeEngines) -> tuple[float, dict[str, torch.Tensor]]:
        return fp8_noise.step(checkpoint, config, precision, make, batches)

    loss, whole = step(config.precision, build_engines)
    again, parts = step(config.precision, partly(["fprop", "dgrad", "wgrad"]))
    assert loss == again and all(torch.equal(parts[name], whole[name]) for name in whole)
    high, bf16 = step(PrecisionConfig("bf16"), build_engines)
    none, rest = step(config.precision, partly([]))
    # The same products of the same operands, whose sums a CPU with bfloat16 instructions may take in another order.
    assert none == pytest.approx(high, rel=1e-4)
    assert fp8_noise.distances(rest, bf16)["all"] < 0.01 * fp8_noise.distances(whole, bf16)["all"]


def test_what_it_says(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fp8_noise.main([f"checkpoint={checkpoint}", "sequences=9"])
    head, _, loss, *rows = capsys.readouterr().out.splitlines()
    assert head == "|  | bf16 | fp8 | fprop alone | dgrad alone | wgrad alone | 2^n scales |"
    assert loss.startswith("| loss |") and loss.count("%") == 6
    kinds = {row.split("|")[1].strip() for row in rows}
    assert kinds == {
        "all",
        "embed_tokens",
        "norms",
        "attention",
        "o_proj",
        "mlp",
        "gate",
        "experts",
        "lm_head",
        "eh_proj",
    }


def test_it_refuses(checkpoint: Path, tmp_path: Path) -> None:
    for arguments, said in (
        ([], "settings are checkpoint=STEP_FOLDER"),
        ([f"checkpoint={checkpoint}", "speed=9"], "settings are checkpoint=STEP_FOLDER"),
        ([f"checkpoint={checkpoint.parent}"], "is no step folder"),
        ([f"checkpoint={checkpoint}", "sequences=0"], "sequences=0 must be a whole number above 0"),
        ([f"checkpoint={trained(tmp_path, 'bf16')}"], "is of a run with precision=bf16: it must be fp8"),
    ):
        with pytest.raises(SystemExit, match=said):
            fp8_noise.main(arguments)
