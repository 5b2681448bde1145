"""`python -m launch generate checkpoint=FOLDER prompt=TEXT`: goes on with a text from a run's checkpoint.

    python -m launch generate checkpoint=runs/tiny prompt='def main('
    python -m launch generate checkpoint=runs/tiny/checkpoints/step-00000300 prompt_file=start.py speculative=true

One process, whatever topology wrote the checkpoint. The text comes to the terminal token by token and ends with the
document or at max_new_tokens; then come the figures. With speculative=true the model's prediction depths draft, and
plain decoding takes turns with it, unseen, to compare text and speed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from launch.settings import GenerateSettings
from train import compose
from train.assemble import load_model
from train.checkpoint.goes_on import read_state
from train.checkpoint.reader import RangeReader
from train.checkpoint.state import TrainState
from train.checkpoint.step_folders import CONFIG_FILE, find_checkpoint
from train.config import RunConfig
from train.data.rows.blend import check_same_tokens, prepared_tokenizer
from train.data.tokenizer import TextStream, Tokenizer
from train.device import uses_cuda
from train.generate import (
    Choice,
    Chooser,
    Kept,
    Transcript,
    first_difference,
    first_near_tie,
    generate,
    is_near_tie,
    kept_per_token,
)
from train.model.transformer import Transformer
from train.precision.config import PrecisionConfig
from train.settings import group, read

# Which state of a checkpoint each word of `weights` means.
STATES = {"model": "master", "ema": "ema"}
NUM_NEW_TOKENS = 128
WARMUP_TOKENS = 3


def generate_command(settings: Sequence[str]) -> int:
    """Says the text and the figures. ValueError, before anything is loaded, for what cannot be done."""
    request = read(GenerateSettings, settings, "generate")
    text, device = _prompt(request), device_of(request.device)
    folder = find_checkpoint(request.checkpoint, "checkpoint")
    state, config = read_state(folder), compose.load(folder / CONFIG_FILE)
    tokenizer = find_tokenizer(config, state, request.tokenizer)
    prompt, max_new_tokens = _fit(text, request.max_new_tokens, config, tokenizer)
    if request.speculative and not config.model.num_nextn_predict_layers:
        raise ValueError("speculative=true needs prediction depths, and model.num_nextn_predict_layers=0 in the run")
    if request.weights == "ema":
        check_average(folder)
    precision = precision_of(config, request.precision)
    model = load_model(folder, config.model, precision, device, STATES[request.weights])
    print(f"{folder}: {request.weights} weights in {precision.name} on {device}\n\n{text}", end="", flush=True)

    def run(speculative: bool, record: Transcript, limit: int = max_new_tokens) -> Iterator[Choice]:
        chooser = Chooser(request.temperature, request.top_p, request.seed)
        return generate(model, prompt, limit, record, chooser, tokenizer.eod, speculative)

    first, second = Transcript(), Transcript()
    for speculative in (False, True)[: 1 + request.speculative]:
        list(run(speculative, Transcript(), min(WARMUP_TOKENS, max_new_tokens)))  # a process computes slowly at first
    plain = run(False, second) if request.speculative else iter(())
    _stream(run(request.speculative, first), plain, tokenizer)
    print("\n\n" + figures(request, model, tokenizer, first, second), flush=True)
    return 0


def find_tokenizer(config: RunConfig, state: TrainState, given: Path | None) -> Tokenizer:
    """The tokenizer of the run's tokens, which lies beside them, unless another place is given.

    ValueError when there is none, when the tokens were prepared anew since, or when the model has too few rows.
    """
    path = prepared_tokenizer(config.data) if given is None else given
    if not path.exists():
        raise ValueError(f"{path}, the tokenizer of the run, is missing: name it with tokenizer=PATH")
    if given is None:
        check_same_tokens(config.data, state.fingerprints["data"])
    tokenizer = Tokenizer.load(path, config.data.end_of_document)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"{path} has {tokenizer.vocab_size} tokens and the model model.vocab_size={config.model.vocab_size}: "
            "it is not the run's"
        )
    return tokenizer


def figures(
    request: GenerateSettings, model: Transformer, tokenizer: Tokenizer, first: Transcript, second: Transcript
) -> str:
    """What the generation took; `second` is plain decoding beside a speculative `first`."""
    lines = [f"prompt       {_count(first.num_prompt_tokens, 'token')} in {first.prefill_s:.3f} s"]
    plain = second if request.speculative else first
    lines.append(f"plain        {_count(len(plain.choices), 'token')}, {plain.tokens_per_s:.1f} tokens/s")
    dtype = model.embed_tokens.weight.dtype
    if request.speculative:
        lines.append(
            f"speculative  {_count(len(first.choices), 'token')}, {first.tokens_per_s:.1f} tokens/s: "
            f"{first.tokens_per_s / plain.tokens_per_s:.2f}x, {first.tokens_per_forward:.2f} tokens per pass"
        )
        lines += _drafts(first)
    if request.temperature == 0:
        lines += _ties(plain, dtype, tokenizer)
        lines += _comparison(first, plain, dtype, tokenizer) if request.speculative else []
    return "\n".join([*lines, *_memory(kept_per_token(model.config), dtype)])


def _drafts(record: Transcript) -> list[str]:
    lines = []
    for depth, (tried, accepted) in enumerate(zip(record.num_tried, record.num_accepted, strict=True), start=1):
        chained = "" if depth == 1 else ", where those before held"
        lines.append(f"drafts       depth {depth}: {accepted} of {tried} held, {accepted / tried:.1%}{chained}")
    return lines


def _ties(plain: Transcript, dtype: torch.dtype, tokenizer: Tokenizer) -> list[str]:
    at = first_near_tie(plain, dtype)
    if at is None:
        return [f"near-ties    none: the smallest gap of logits is {min(each.gap for each in plain.choices):.3g}"]
    return [f"near-ties    the first at token {at + 1}: {_shown(plain.choices[at], tokenizer)}"]


def _comparison(first: Transcript, plain: Transcript, dtype: torch.dtype, tokenizer: Tokenizer) -> list[str]:
    at = first_difference(first, plain)
    if at is None:
        return ["texts        equal"]
    both = first.choices[at], plain.choices[at]
    near = any(is_near_tie(choice, dtype) for choice in both)
    why = "a near-tie" if near else "no near-tie of logits; one of a router's scores, if all is well"
    return [
        f"texts        equal up to token {at + 1}, {why}",
        f"             speculative: {_shown(both[0], tokenizer)}",
        f"             plain:       {_shown(both[1], tokenizer)}",
    ]


def _shown(choice: Choice, tokenizer: Tokenizer) -> str:
    words = [
        f"{tokenizer.decode([token])!r} {logit:.8g}" for token, logit in zip(choice.best, choice.logits, strict=True)
    ]
    return f"{words[0]} before {words[1]}, gap {choice.gap:.2g}"


def _memory(kept: Kept, dtype: torch.dtype) -> list[str]:
    size = dtype.itemsize
    lines = [f"cache        {kept.main * size:,} bytes per token"]
    if kept.depths:
        lines[0] += f", and {kept.depths * size:,} of the prediction depths where they draft"
    for name, values in kept.others.items():
        lines.append(f"             {name} would keep {values * size:,}, {values / kept.main:.1f}x")
    return lines


def _stream(shown: Iterator[Choice], unseen: Iterator[Choice], tokenizer: Tokenizer) -> None:
    """One generation as text. The other runs beside it, so that what slows this machine down slows both."""
    text = TextStream(tokenizer)
    for choice, _ in itertools.zip_longest(shown, unseen):
        if choice is not None and choice.token != tokenizer.eod:
            print(text.push(choice.token), end="", flush=True)
    print(text.end(), end="", flush=True)


def _fit(text: str, asked: int | None, config: RunConfig, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """The prompt's tokens and how many may follow. ValueError when the model has too few positions."""
    prompt, most = tokenizer.encode([text])[0].tolist(), config.model.max_position_embeddings
    if len(prompt) >= most:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens and leaves no position for another: "
            f"model.max_position_embeddings={most}"
        )
    if asked is not None and len(prompt) + asked > most:
        raise ValueError(
            f"max_new_tokens={asked} behind a prompt of {len(prompt)} tokens is above "
            f"model.max_position_embeddings={most}"
        )
    return prompt, asked or min(NUM_NEW_TOKENS, most - len(prompt))


def precision_of(config: RunConfig, asked: str | None) -> PrecisionConfig:
    """The precision of this name, or the run's."""
    if asked in (None, config.precision.name):
        return config.precision
    assert asked is not None
    return group(PrecisionConfig, "precision", asked)


def check_average(folder: Path) -> None:
    """ValueError where a checkpoint holds no moving average of the weights."""
    with RangeReader(folder) as reader:
        names = list(reader.tensors)
    if not any(name.startswith("ema.") for name in names):
        raise ValueError(f"weights=ema: {folder} holds no moving average, as optimizer.ema_decay was 0 in the run")


def _prompt(request: GenerateSettings) -> str:
    """The text to go on with. ValueError for a file that cannot be read, or is empty."""
    if request.prompt_file is None:
        assert request.prompt is not None
        return request.prompt
    try:
        text = request.prompt_file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(f"prompt_file={request.prompt_file} cannot be read: {reason}") from None
    if not text:
        raise ValueError(f"prompt_file={request.prompt_file} is empty: a prompt has at least one token")
    return text


def device_of(name: str) -> torch.device:
    """What `device` means on this machine. ValueError for one that it has not."""
    return torch.device("cuda" if uses_cuda("device", name) else "cpu")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
