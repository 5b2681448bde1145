"""Text from a model: token by token, or several at once where its own drafts hold (speculative decoding)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from train.model.config import ModelConfig
from train.model.decode import Decoder, Drafter
from train.model.transformer import Transformer

# Tokens of a prompt that go through the model together: scores are [heads, this, tokens so far].
CHUNK_TOKENS = 256


@dataclass(frozen=True)
class Choice:
    """A token that was generated, and the two largest logits where it was chosen, with their tokens."""

    token: int
    best: tuple[int, int]
    logits: tuple[float, float]

    @property
    def gap(self) -> float:
        """By how much the best logit is ahead."""
        return self.logits[0] - self.logits[1]


@dataclass
class Transcript:
    """What became of one generation. Times leave out what the receiver of the tokens does with them.

    num_tried and num_accepted count the drafts of each depth: those reached, as all before them in their chain held,
    and those that held.
    """

    num_prompt_tokens: int = 0
    choices: list[Choice] = field(default_factory=list)
    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_forwards: int = 0
    num_tried: list[int] = field(default_factory=list)
    num_accepted: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [choice.token for choice in self.choices]

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of decoding, without the first, which the prompt's own pass predicts; nan without any."""
        return (len(self.choices) - 1) / self.decode_s if self.decode_s else float("nan")

    @property
    def tokens_per_forward(self) -> float:
        """Tokens per pass of the main model, without the first: 1 without drafts, nan without any pass."""
        return (len(self.choices) - 1) / self.num_forwards if self.num_forwards else float("nan")


class Chooser:
    """How a token is chosen: the best one at temperature 0, else drawn from the softmax of logits / temperature, cut to
    the fewest tokens that hold `top_p` of it."""

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        self.temperature, self.top_p = temperature, top_p
        self._generator = torch.Generator().manual_seed(seed)

    def probabilities(self, logits: Tensor) -> Tensor:
        """logits [N, V] -> the distribution that each token is chosen from, float64 [N, V]."""
        if self.temperature == 0:
            return torch.zeros_like(logits, dtype=torch.float64).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        whole = torch.softmax(logits.double() / self.temperature, -1)
        if self.top_p == 1:
            return whole
        falling, order = whole.sort(dim=-1, descending=True, stable=True)
        before = falling.cumsum(-1) - falling
        kept = torch.zeros_like(whole).scatter_(-1, order, falling * (before < self.top_p))
        return kept / kept.sum(-1, keepdim=True)

    def uniform(self) -> float:
        """A number in [0, 1)."""
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))

    def draw(self, weights: Tensor) -> int:
        """A token from the distribution that is proportional to weights [V]."""
        if self.temperature == 0:
            return int(weights.argmax())
        sums = weights.cumsum(-1)
        drawn = int(torch.searchsorted(sums, self.uniform() * sums[-1], right=True))
        # A product rounded up to the sum itself would fall behind the last token that has a weight.
        return min(drawn, int(weights.nonzero()[-1]))


def generate(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    transcript: Transcript,
    chooser: Chooser | None = None,
    stop: int | None = None,
    speculative: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Iterator[Choice]:
    """Go on with `prompt` (at least one token) until `max_new_tokens` (at least one) or the token `stop`, which counts.

    With `speculative` the model's prediction depths draft, and one pass of the main model over the next token and the
    drafts says which of them hold. Chosen by temperature 0, the tokens are those of plain decoding but for roundings;
    else they have the same distribution (arXiv 2211.17192, Algorithm 1).

    Yields every token as soon as it is certain; `transcript` has it then, too.
    """
    chooser, began = chooser or Chooser(), time.perf_counter()
    capacity = len(prompt) + max_new_tokens
    decoder, drafter = Decoder(model, capacity), Drafter(model, capacity) if speculative else None
    transcript.num_prompt_tokens = len(prompt)
    states = _read_prompt(decoder, drafter, prompt, chunk_tokens)
    known = list(prompt)
    logits = decoder.logits(states[:, -1:])
    found = [_choice(chooser.draw(chooser.probabilities(logits)[0]), logits[0])]
    transcript.prefill_s += time.perf_counter() - began
    while True:
        for choice in found:
            known.append(choice.token)
            transcript.choices.append(choice)
            yield choice
            if choice.token == stop or len(transcript.choices) == max_new_tokens:
                return
        began = time.perf_counter()
        num_left = max_new_tokens - len(transcript.choices)
        chain = _draft(drafter, states, known, chooser, num_left - 1) if drafter is not None else _Chain([], [])
        states = decoder.read([known[-1], *chain.tokens])
        logits = decoder.logits(states)
        found = _verify(chooser, chain, logits, transcript)
        states = states[:, : len(found)]
        decoder.rewind(len(known) + len(found) - 1)
        transcript.num_forwards += 1
        transcript.decode_s += time.perf_counter() - began


@dataclass(frozen=True)
class _Chain:
    """Drafts in order, and the distribution [V] that each was drawn from."""

    tokens: list[int]
    weights: list[Tensor]


def _read_prompt(decoder: Decoder, drafter: Drafter | None, prompt: Sequence[int], chunk_tokens: int) -> Tensor:
    """The states of the prompt's last chunk, which the drafter has not followed yet."""
    states = decoder.read(prompt[:chunk_tokens])
    for start in range(chunk_tokens, len(prompt), chunk_tokens):
        if drafter is not None:
            drafter.follow(states, prompt)
        states = decoder.read(prompt[start : start + chunk_tokens])
    return states


def _draft(drafter: Drafter, states: Tensor, known: list[int], chooser: Chooser, at_most: int) -> _Chain:
    weights: list[Tensor] = []

    def pick(logits: Tensor) -> int:
        weights.append(chooser.probabilities(logits[None])[0])
        return chooser.draw(weights[-1])

    return _Chain(drafter.follow(states, known, pick)[:at_most], weights)


def _verify(chooser: Chooser, chain: _Chain, logits: Tensor, transcript: Transcript) -> list[Choice]:
    """The drafts that hold, and the token behind them; logits [drafts + 1, V].

    A draft drawn from q holds with probability min(1, p / q); in its place comes a token from max(p - q, 0). At
    temperature 0 both are certain: the draft is the best token, or the best token comes instead.
    """
    wanted = chooser.probabilities(logits)
    found: list[Choice] = []
    for number, (token, weights) in enumerate(zip(chain.tokens, chain.weights, strict=False)):
        holds = chooser.uniform() * float(weights[token]) < float(wanted[number, token])
        _count(transcript.num_tried, number, 1)
        _count(transcript.num_accepted, number, int(holds))
        if not holds:
            token = chooser.draw((wanted[number] - weights).clamp(min=0))
            return [*found, _choice(token, logits[number])]
        found.append(_choice(token, logits[number]))
    return [*found, _choice(chooser.draw(wanted[-1]), logits[-1])]


def _count(counts: list[int], number: int, more: int) -> None:
    counts.extend([0] * (number + 1 - len(counts)))
    counts[number] += more


def _choice(token: int, logits: Tensor) -> Choice:
    values, tokens = logits.topk(2)
    first, second = values.tolist()
    best, rival = tokens.tolist()
    return Choice(token, (best, rival), (first, second))


# By how many roundings of the largest logit two may differ between a pass over one token and one over several. Seen in
# models of 2 to 4 layers: up to 8 in float32, whose sums are associated differently; one in bfloat16, whose products
# are summed more widely than they are stored. Twice that and more: two logits may move against each other.
_ROUNDINGS = {torch.float64: 16, torch.float32: 16, torch.bfloat16: 4}


def is_near_tie(choice: Choice, dtype: torch.dtype) -> bool:
    """Whether roundings of a model of this type may choose the other of the two best tokens."""
    size = max(abs(logit) for logit in choice.logits)
    return choice.gap <= _ROUNDINGS[dtype] * torch.finfo(dtype).eps * size


def first_near_tie(transcript: Transcript, dtype: torch.dtype) -> int | None:
    """The first token that was chosen at a near-tie, from 0."""
    return next((at for at, choice in enumerate(transcript.choices) if is_near_tie(choice, dtype)), None)


def first_difference(one: Transcript, other: Transcript) -> int | None:
    """The first token in which two generations differ, from 0; None where all are equal."""
    pairs = enumerate(zip(one.tokens, other.tokens, strict=False))
    at = next((at for at, (a, b) in pairs if a != b), None)
    shorter = min(len(one.tokens), len(other.tokens))
    return shorter if at is None and len(one.tokens) != len(other.tokens) else at


@dataclass(frozen=True)
class Kept:
    """Numbers that `generate` keeps of one token.

    Attributes:
        main: in the main model's caches.
        depths: in those of all its prediction depths, where they draft.
        others: in the main model's, had it another attention of as many and as wide heads; by its name.
    """

    main: int
    depths: int
    others: dict[str, int]


def kept_per_token(config: ModelConfig) -> Kept:
    """What the caches of a model keep of a token, in closed form."""
    sizes, num_layers = config.attention_sizes, config.num_hidden_layers
    return Kept(
        main=num_layers * sizes.cache_width,
        depths=config.num_nextn_predict_layers * sizes.cache_width,
        others={name: num_layers * width for name, width in sizes.cache_widths_of_others.items()},
    )
