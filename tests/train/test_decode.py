"""Decoding over caches against the forward pass of training, and what the caches hold."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.train.decode_cases import head, main_states, whole_states
from tests.train.model_cases import (
    TINY,
    V3,
    build,
    random_config,
    random_dense_config,
    random_routing,
    random_tokens,
    random_v2_config,
    with_grouped_attention,
)
from train.generate import kept_per_token
from train.model.attention.cache import Cache, LatentCache
from train.model.attention.cores import TorchCore
from train.model.config import ModelConfig
from train.model.decode import Decoder, Drafter
from train.model.packing import Places
from train.model.transformer import Transformer
from train.precision.build import everywhere
from train.precision.torch_engine import TorchEngine

# float64 logits of size 1 to 10 through a few layers: sums are only associated differently.
EXACT = 1e-10


def chunks(length: int, seed: int) -> list[slice]:
    """[0, length) cut at random places; with an even seed token by token."""
    places = range(1, length)
    cuts = (
        list(places) if seed % 2 == 0 else sorted(random.Random(seed).sample(places, random.Random(seed).randint(0, 5)))
    )
    return [slice(a, b) for a, b in pairwise([0, *cuts, length])]


@pytest.mark.parametrize("seed", range(24))
def test_decoding_is_the_forward_pass(seed: int) -> None:
    """Random shapes: with and without a latent of queries, YaRN, dense first layers, up to three prediction depths."""
    decodes_as_trained(random_config(seed, num_nextn_predict_layers=seed % 4), seed)


@pytest.mark.parametrize("seed", range(8))
def test_decoding_a_dense_model_with_grouped_attention(seed: int) -> None:
    decodes_as_trained(random_dense_config(seed, num_nextn_predict_layers=seed % 3), seed)


@pytest.mark.parametrize("seed", range(4))
def test_decoding_experts_beside_grouped_attention(seed: int) -> None:
    config = with_grouped_attention(random_config(seed, num_attention_heads=6), num_key_value_heads=2, head_dim=6)
    decodes_as_trained(replace(config, num_nextn_predict_layers=1), seed)


@pytest.mark.parametrize("draw", [random_routing, random_v2_config])
@pytest.mark.parametrize("seed", range(3))
def test_decoding_through_other_routers(draw: Callable[..., ModelConfig], seed: int) -> None:
    decodes_as_trained(replace(draw(seed), num_nextn_predict_layers=1), seed)


def decodes_as_trained(config: ModelConfig, seed: int) -> None:
    """Logits of all tokens and states of all depths, the text cut into random chunks."""
    model = build(config, seed=seed)
    tokens = random_tokens(config, 1, 22, seed)[0].tolist()
    main, *depths = whole_states(model, tokens)
    decoder, drafter = Decoder(model, len(tokens)), Drafter(model, len(tokens))
    logits, made = [], [[] for _ in depths]
    for k, depth in enumerate(drafter.depths):
        read, parts = depth.read, made[k]
        depth.read = lambda states, known, read=read, parts=parts: parts.append(read(states, known)) or parts[-1]
    for part in chunks(len(tokens), seed):
        states = decoder.read(tokens[part])
        logits.append(decoder.logits(states))
        drafter.follow(states, tokens[: part.stop])
    assert float((torch.cat(logits) - head(model, main)).abs().max()) < EXACT
    for k, wanted in enumerate(depths, start=1):
        found = torch.cat(made[k - 1], 1)[0]
        assert found.shape == (len(tokens) - k, config.hidden_size)
        assert float((found - wanted).abs().max()) < EXACT


@pytest.mark.parametrize("seed", range(4))
def test_what_is_rewound_leaves_no_trace(seed: int) -> None:
    model = build(random_config(seed), seed=seed)
    tokens = random_tokens(model.config, 1, 15, seed)[0].tolist()
    decoder = Decoder(model, 32)
    decoder.read(tokens[:9])
    decoder.read(tokens[3:12])  # a text that is given up
    decoder.rewind(9)
    found = head(model, decoder.read(tokens[9:])[0])
    assert float((found - head(model, main_states(model, tokens))[9:]).abs().max()) < EXACT


@pytest.mark.parametrize("seed", range(4))
def test_absorbed_is_unabsorbed(seed: int) -> None:
    """One layer's attention with keys and values of all heads against the one that never makes them."""
    config = random_config(seed)
    model = build(config, seed=seed)
    attention = next(iter(model.layers.values())).self_attn
    x = torch.randn(1, 13, config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    table = Decoder(model, 13)._table
    cache = attention.new_cache(13)
    with torch.no_grad():
        found = torch.cat([attention.decode(x[:, i : i + 1], table[i : i + 1], cache) for i in range(13)], 1)
        assert float((found - attention(x, Places(table, TorchCore().causally))).abs().max()) < EXACT


def test_the_cache_holds_latents_and_one_key_alone() -> None:
    """No tensor of a step is as large as keys or values of single heads for the tokens before would be."""
    made: list[int] = []
    model, length = build(TINY), 40
    decoder = Decoder(model, length + 1)
    decoder.read(list(range(length)))
    rows = [cache._kept for cache in decoder.caches]
    assert [each.numel() for each in rows] == [(length + 1) * (10 + 6)] * TINY.num_hidden_layers

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            ours = {each.untyped_storage().data_ptr() for each in rows}
            for each in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in ours:
                    made.append(each.numel() if each._base is None else 0)
            return out

    with Sizes():
        decoder.read([5])
    heads, key, value = TINY.num_attention_heads, TINY.attention_sizes.qk_head_dim, TINY.v_head_dim
    # Scores, [heads, tokens], and the experts' weights are views or smaller; keys or values of heads are not.
    assert made and not {heads * length * key, heads * length * value, heads * (length + 1) * key} & set(made)
    assert not {heads * (length + 1) * value, heads * (length + 1) * TINY.qk_nope_head_dim} & set(made)


def numbers_per_token(model: Transformer) -> tuple[int, int]:
    """What the tensors of the caches hold of a token: those of the main model, those of its prediction depths."""

    def held(cache: Cache) -> int:
        rows = [each for name, each in vars(cache).items() if isinstance(each, torch.Tensor) and name != "_like"]
        return sum(each.numel() for each in rows) // cache.capacity

    main, depths = Decoder(model, 3).caches, [depth.cache for depth in Drafter(model, 3).depths]
    return sum(map(held, main)), sum(map(held, depths))


def test_published_numbers_per_token() -> None:
    """V3 keeps 576 numbers per layer and token, 70,272 bytes in bfloat16 (arXiv 2505.09343)."""
    with torch.device("meta"):
        model = Transformer(V3, _NoExperts(), everywhere(TorchEngine()))
    kept = kept_per_token(V3)
    assert numbers_per_token(model) == (kept.main, kept.depths)
    assert kept.main == 576 * 61 and 2 * kept.main == 70_272
    assert kept.depths == 576
    assert kept.others == {"MHA": 61 * 128 * (192 + 128), "GQA of 8": 61 * 8 * (192 + 128)}


class _NoExperts:
    """A dispatch for a model that is only looked at."""

    num_local_experts, first_expert = 1, 0


def test_a_grouped_cache_holds_the_groups_keys_and_values() -> None:
    config = with_grouped_attention(TINY, num_key_value_heads=1, head_dim=8)
    kept = kept_per_token(config)
    assert numbers_per_token(build(config)) == (kept.main, kept.depths)
    assert kept.main == TINY.num_hidden_layers * 2 * 8
    assert kept.others == {"MHA": TINY.num_hidden_layers * TINY.num_attention_heads * 2 * 8}


def test_a_cache_refuses_what_it_has_no_room_for() -> None:
    cache = LatentCache(2, 3, 2, torch.zeros(1))
    cache.append(torch.zeros(2, 3), torch.zeros(2, 2))
    with pytest.raises(AssertionError, match="3 tokens in a cache of 2"):
        cache.append(torch.zeros(1, 3), torch.zeros(1, 2))
    with pytest.raises(AssertionError, match="length=3 of 2 tokens"):
        cache.rewind(3)
