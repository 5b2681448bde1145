"""The worked example: every command of docs/example.md runs, and what comes out is a model that others can load."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.exports import logits, state_of, transformers_model
from tests.test_first_hour import run_page
from train import compose
from train.data.tokenizer import Tokenizer

PAGE = Path(__file__).resolve().parent.parent / "docs" / "example.md"


def test_the_example_does_what_it_shows(tmp_path: Path) -> None:
    folder = run_page(PAGE, tmp_path, timeout_s=1800)
    from transformers import AutoTokenizer

    best = folder / "runs" / "rates-sweep" / "lr_scheduler.lr=0.003"
    config = compose.load(best / "config.yaml")
    assert "unigram entropy" in (best / "report.html").read_text()
    text = next((folder / "my-texts").glob("*.py")).read_text()
    tokens = Tokenizer.load(folder / "my-tokens" / "tokenizer.json").encode([text])[0].tolist()
    assert AutoTokenizer.from_pretrained(folder / "my-model")(text)["input_ids"] == tokens

    oracle = transformers_model(folder / "my-model", torch.float64)
    assert type(oracle).__name__ == "DeepseekV3ForCausalLM"
    inputs = torch.tensor([tokens[: config.train.seq_len]])
    expected = oracle(input_ids=inputs).logits.detach()
    ours = logits(config.model, state_of(best / "checkpoints" / "step-00000008", config.model), inputs, torch.float64)
    # Its norms, router and rotary tables are float32 whatever it is asked.
    assert bool(expected.isfinite().all()) and (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
