"""How the model goes on with fixed prompts in the middle of a run: the same text under any topology.

There is no cache, which would need a second way through the layers under every topology: each token costs a forward
pass of all ranks over the texts so far. Nothing of the run is touched: none of its random numbers is drawn, no load is
counted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.data.rows.blend import seed_of
from train.generate import Chooser
from train.job import Job
from train.precision.grads import wide_dtype
from train.prompts import Prompts
from train.track.metrics import Sample

# Texts are filled up to a multiple of this: some products of matrices take no other number of rows.
LENGTH_QUANTUM = 16


def samples(job: Job, prompts: Prompts) -> list[Sample]:
    """Each prompt with what follows it: at most `evaluate.prompt_tokens`, up to the end of the document.

    Texts go one by one, all filled up to the length of the longest, so that a token is chosen by the same product of
    the same shape under any topology. Where two tokens are nearly equally good, roundings may choose the other one.
    """
    job.begin(f"prompts after step {job.step}")
    known, unfinished = [list(tokens) for tokens in prompts.tokens], list(range(len(prompts.tokens)))
    for _ in range(job.config.evaluate.prompt_tokens):
        if not unfinished:
            break
        for number, token in next_tokens(job, known, unfinished).items():
            known[number].append(token)
        unfinished = [number for number in unfinished if known[number][-1] != prompts.tokenizer.eod]
    job.forget_exchanges()
    return [_sample(prompts, number, tokens) for number, tokens in enumerate(known)]


@torch.no_grad()
def next_tokens(job: Job, known: list[list[int]], unfinished: list[int]) -> dict[int, int]:
    """The token that follows each unfinished text, by the text's number: the same on all ranks, which all take part."""
    mesh, most = job.groups.mesh, max(len(known[number]) for number in unfinished)
    length = -(-most // LENGTH_QUANTUM) * LENGTH_QUANTUM
    per_rank = -(-len(unfinished) // mesh.config.dp)
    own = unfinished[mesh.dp_rank * per_rank : (mesh.dp_rank + 1) * per_rank]

    def text(micro_batch: int) -> Tensor:
        # A rank that has no text left reads any, as its experts are needed.
        tokens = known[own[micro_batch] if micro_batch < len(own) else unfinished[0]]
        return job.host.put(torch.tensor([tokens + [0] * (length - len(tokens))]))

    chosen = dict.fromkeys(unfinished, -1)
    for micro_batch, states in job.read(text, per_rank, length).items():
        if micro_batch < len(own):
            number = own[micro_batch]
            chosen[number] = _choose(job, number, len(known[number]), states)
    mine = job.host.put(torch.tensor(list(chosen.values())))
    (everyone,) = job.host.read("next tokens", job.gather(mine))
    return dict(zip(unfinished, map(max, zip(*everyone, strict=True)), strict=True))


def _choose(job: Job, number: int, num_known: int, states: Tensor) -> int:
    """The token behind the known ones of a text, by its normed states [1, S, hidden]."""
    head = next(model for model in job.models if model.parts.head)
    logits = head.lm_head(states[:, num_known - 1 : num_known])[0].to(wide_dtype(states.dtype))
    # Drawn by the place alone, whichever rank it is that draws.
    seed = seed_of(job.config.train.seed, f"prompt {number} {job.step} {num_known}")
    chooser = Chooser(job.config.evaluate.prompt_temperature, seed=seed)
    return chooser.draw(chooser.probabilities(logits)[0])


def _sample(prompts: Prompts, number: int, tokens: list[int]) -> Sample:
    """Decoded behind the prompt, as some tokenizers write a token at the start of a text differently."""
    decode, given = prompts.tokenizer.decode, prompts.tokens[number]
    kept = tokens[:-1] if tokens[-1] == prompts.tokenizer.eod and len(tokens) > len(given) else tokens
    return Sample(prompts.texts[number], decode(kept)[len(decode(given)) :])
