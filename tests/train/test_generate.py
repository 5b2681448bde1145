"""Plain, speculative and sampled text against readings that know no cache and no drafts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.bounds import is_plausible
from tests.train.decode_cases import agreeing_model, greedy_text, head, main_states
from tests.train.model_cases import TINY, build, random_config, random_tokens
from train.generate import (
    Choice,
    Chooser,
    Transcript,
    _Chain,
    _verify,
    first_difference,
    first_near_tie,
    generate,
    is_near_tie,
)
from train.model.transformer import Transformer


def run(model: Transformer, prompt: list[int], num_new: int, **ways) -> Transcript:
    transcript = Transcript()
    found = list(generate(model, prompt, num_new, transcript, **ways))
    assert found == transcript.choices and transcript.num_prompt_tokens == len(prompt)
    return transcript


@pytest.mark.parametrize("seed", range(6))
def test_plain_text_is_the_forward_pass_again_and_again(seed: int) -> None:
    config = random_config(seed)
    model = build(config, seed=seed)
    prompt = random_tokens(config, 1, seed, seed)[0].tolist()
    transcript = run(model, prompt, 12, chunk_tokens=1 + seed)
    assert transcript.tokens == greedy_text(model, prompt, 12)
    for choice in transcript.choices:
        assert choice.token == choice.best[0] and choice.gap >= 0
    assert transcript.num_forwards == 11 and transcript.tokens_per_forward == 1


@pytest.mark.parametrize("seed", range(20))
def test_speculative_text_is_the_plain_one(seed: int) -> None:
    """Random models, whose drafts hardly ever hold: text, logits and counts."""
    config = random_config(seed, num_nextn_predict_layers=1 + seed % 3, max_position_embeddings=128)
    model = build(config, seed=seed)
    prompt = random_tokens(config, 1, seed % 7, seed)[0].tolist()
    plain = run(model, prompt, 40)
    drafted = run(model, prompt, 40, speculative=True, chunk_tokens=1 + seed % 4)
    assert drafted.tokens == plain.tokens
    assert [each.best for each in drafted.choices] == [each.best for each in plain.choices]
    assert [each.gap for each in drafted.choices] == pytest.approx([each.gap for each in plain.choices], abs=1e-9)
    check_counts(drafted)


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.15])
@pytest.mark.parametrize("seed", range(4))
def test_drafts_that_hold_save_passes_and_change_nothing(noise: float, seed: int) -> None:
    depths = 1 + seed % 3
    config = random_config(seed, num_nextn_predict_layers=depths, vocab_size=61, hidden_size=32)
    model = agreeing_model(config, noise, seed)
    prompt = random_tokens(config, 1, 4, seed)[0].tolist()
    plain, drafted = run(model, prompt, 41), run(model, prompt, 41, speculative=True)
    assert drafted.tokens == plain.tokens
    check_counts(drafted)
    if noise == 0:
        assert drafted.num_accepted == drafted.num_tried and len(drafted.num_tried) == depths
        assert drafted.num_forwards == -(-40 // (depths + 1))


def check_counts(transcript: Transcript) -> None:
    """Each pass gives a token beside the drafts that held; a depth is tried where the one before held."""
    assert len(transcript.choices) - 1 == transcript.num_forwards + sum(transcript.num_accepted)
    for before, tried in zip(transcript.num_accepted, transcript.num_tried[1:], strict=False):
        assert tried <= before


def test_some_drafts_hold_and_some_do_not() -> None:
    """What the tests above rest on: at every depth both ways out of a check are taken."""
    config = random_config(2, num_nextn_predict_layers=3, vocab_size=61, hidden_size=32)
    records = [run(agreeing_model(config, noise, 2), [3, 1, 4], 61, speculative=True) for noise in (0.05, 0.15)]
    for depth in range(3):
        tried = sum(transcript.num_tried[depth] for transcript in records)
        assert 0 < sum(transcript.num_accepted[depth] for transcript in records) < tried


@pytest.mark.parametrize("speculative", [False, True])
def test_it_ends_with_the_document(speculative: bool) -> None:
    config = random_config(1, num_nextn_predict_layers=2, vocab_size=61, hidden_size=32)
    model = agreeing_model(config, 0.0, 1)
    whole = run(model, [7], 30).tokens
    for stop in dict.fromkeys(whole):
        found = run(model, [7], 30, stop=stop, speculative=speculative).tokens
        assert found == whole[: whole.index(stop) + 1]


@pytest.mark.parametrize("num_new", [1, 2, 3, 4])
def test_a_limit_is_kept_whatever_the_drafts(num_new: int) -> None:
    config = random_config(1, num_nextn_predict_layers=3, vocab_size=61, hidden_size=32)
    model = agreeing_model(config, 0.0, 1)
    assert len(run(model, [7, 8], num_new, speculative=True).tokens) == num_new


# Of each comparison of counts here; there are less than ten.
FAILURE = 1e-7


def test_a_refused_draft_is_replaced_so_that_nothing_shows() -> None:
    """Chains of two drafts whose distributions are far from the wanted ones: what is found has the wanted ones."""
    num_draws, chooser = 4000, Chooser(1.0, seed=3)
    wanted = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.4, 0.1]], dtype=torch.float64)
    drafted = torch.tensor([[0.1, 0.3, 0.2, 0.4], [0.4, 0.3, 0.3, 0.0]], dtype=torch.float64)
    logits, transcript, found = wanted.log(), Transcript(), []
    for _ in range(num_draws):
        chain = _Chain([chooser.draw(weights) for weights in drafted], list(drafted))
        found.append([choice.token for choice in _verify(chooser, chain, logits, transcript)])
    for place in range(3):
        tokens = Counter(each[place] for each in found if len(each) > place)
        total = sum(tokens.values())
        assert total > 1000
        assert is_plausible([tokens[token] for token in range(4)], wanted[place].tolist(), FAILURE)
    # A draft holds with probability Σ min(p, q).
    for depth, tried in enumerate(transcript.num_tried):
        due = float(torch.minimum(wanted[depth], drafted[depth]).sum())
        held = transcript.num_accepted[depth]
        assert is_plausible([held, tried - held], [due, 1 - due], FAILURE)


@pytest.mark.parametrize(("temperature", "top_p", "speculative"), [(0.8, 0.9, False), (0.4, 1.0, True)])
def test_sampled_texts_have_the_distribution(temperature: float, top_p: float, speculative: bool) -> None:
    """Texts of three tokens, many times, against their exact probabilities; those due less than five times together."""
    num_draws, config = 400, replace(TINY, vocab_size=4, num_hidden_layers=1, num_nextn_predict_layers=1)
    model = agreeing_model(config, 0.3, 0)
    chooser = Chooser(temperature, top_p)

    def next_token(text: list[int]) -> list[float]:
        return chooser.probabilities(head(model, main_states(model, text)[-1:]))[0].tolist()

    due: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        due = {(*text, token): q * p for text, q in due.items() for token, p in enumerate(next_token([2, *text]))}
    ways = {"chooser": Chooser(temperature, top_p, seed=1), "speculative": speculative}
    records = [run(model, [2], 3, **ways) for _ in range(num_draws)]
    found = Counter(tuple(transcript.tokens) for transcript in records)
    assert all(due[text] > 0 for text in found)
    often = [text for text, p in due.items() if num_draws * p >= 5]
    counts, shares = [found[text] for text in often], [due[text] for text in often]
    assert len(often) > 5
    # What is rounding of the sum of all shares is no share of the rest.
    rest = max(1e-12, 1 - sum(shares))
    assert is_plausible([*counts, num_draws - sum(counts)], [*shares, rest], FAILURE)
    if speculative:  # some hold, some do not
        assert 0.1 < sum(r.num_accepted[0] for r in records) / sum(r.num_tried[0] for r in records) < 0.95


def test_a_seed_repeats_a_text() -> None:
    model = build(TINY)
    texts = [run(model, [1, 2], 20, chooser=Chooser(1.0, 0.9, seed)).tokens for seed in (4, 4, 5)]
    assert texts[0] == texts[1] != texts[2]


def test_top_p_keeps_the_fewest_tokens_that_hold_it() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.25, 0.05]], dtype=torch.float64).log()
    for top_p, kept in ((0.4, {0}), (0.5, {0}), (0.51, {0, 2}), (0.75, {0, 2}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        found = Chooser(1.0, top_p).probabilities(logits)[0]
        assert set(found.nonzero().flatten().tolist()) == kept
        assert float(found.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_differ_at_near_ties_only(dtype: torch.dtype) -> None:
    """Up to its first near-tie a text is the same with and without drafts, in models without routers.

    Beside an expert's border a rounding may choose another expert, which moves logits by more than any rounding.
    """
    for seed in range(8):
        shape = {"num_hidden_layers": 2, "first_k_dense_replace": 2, "num_nextn_predict_layers": 1}
        model = build(random_config(seed, **shape, vocab_size=80), dtype, seed=seed)
        plain, drafted = (run(model, [5, 6, 7], 50, speculative=speculative) for speculative in (False, True))
        at, tie = first_difference(plain, drafted), first_near_tie(plain, dtype)
        assert at is None or (tie is not None and tie <= at)


def test_near_ties_are_found() -> None:
    def gap(size: float) -> Choice:
        return Choice(0, (0, 1), (8.0, 8.0 - size))

    assert is_near_tie(gap(0.0), torch.float64) and not is_near_tie(gap(1e-6), torch.float64)
    assert is_near_tie(gap(1e-6), torch.float32) and not is_near_tie(gap(1e-3), torch.float32)
    assert is_near_tie(gap(0.0625), torch.bfloat16) and not is_near_tie(gap(3.0), torch.bfloat16)
    transcript = Transcript(choices=[gap(1.0), gap(1e-7), gap(0.0)])
    assert first_near_tie(transcript, torch.float32) == 1
    assert first_near_tie(Transcript(choices=[gap(1.0)]), torch.float32) is None


def test_differences_are_found() -> None:
    def text(*tokens: int) -> Transcript:
        return Transcript(choices=[Choice(token, (token, 0), (1.0, 0.0)) for token in tokens])

    assert first_difference(text(1, 2), text(1, 2)) is None
    assert first_difference(text(1, 2, 3), text(1, 4, 3)) == 1
    assert first_difference(text(1, 2), text(1, 2, 3)) == 2
