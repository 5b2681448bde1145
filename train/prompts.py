"""The texts of `evaluate.prompts` as tokens, checked before a run starts."""

from __future__ import annotations

from dataclasses import dataclass

from train.config import RunConfig
from train.data.rows.blend import prepared_tokenizer
from train.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompts:
    """Texts that a model is to go on with, and the tokens of each, at least one."""

    texts: list[str]
    tokens: list[list[int]]
    tokenizer: Tokenizer


def read_prompts(config: RunConfig) -> Prompts | None:
    """The prompts of a run whose data are prepared; None without any.

    ValueError when the model has too few positions for a prompt and what is to follow.
    """
    settings, most = config.evaluate, config.model.max_position_embeddings
    if not settings.prompts:
        return None
    tokenizer = Tokenizer.load(prepared_tokenizer(config.data), config.data.end_of_document)
    tokens = [ids.tolist() for ids in tokenizer.encode(settings.prompts)]
    for text, ids in zip(settings.prompts, tokens, strict=True):
        if len(ids) + settings.prompt_tokens > most:
            raise ValueError(
                f"evaluate.prompts: {text[:40]!r} has {len(ids)} tokens, and with evaluate.prompt_tokens="
                f"{settings.prompt_tokens} behind it is above model.max_position_embeddings={most}"
            )
    return Prompts(list(settings.prompts), tokens, tokenizer)
