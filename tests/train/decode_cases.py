"""Models that go on with a text, and slow readings of what they must say."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.train.model_cases import build
from train.model.config import ModelConfig
from train.model.loss import LossTerms
from train.model.tape import Inline, drive
from train.model.transformer import Transformer

TERMS = LossTerms(1.0, 0.0, 0.0)


@torch.no_grad()
def main_states(model: Transformer, tokens: list[int]) -> Tensor:
    """Normed states [S, hidden] of the main model, from the forward pass of training."""
    hidden = model.embed_tokens(torch.tensor([tokens]))
    return model.norm(drive(model.run_layers(hidden, TERMS, Inline(), model.empty_findings(hidden.device))))[0]


@torch.no_grad()
def whole_states(model: Transformer, tokens: list[int]) -> list[Tensor]:
    """The hidden states of the main model, then those of each depth k, [S - k, hidden]."""
    hidden = main_states(model, tokens)
    normed: list[Tensor] = []
    hooks = [module.norm.register_forward_hook(lambda _m, _i, out: normed.append(out[0])) for module in model.mtp]
    # It reads S + 1 tokens, of which the last is only a label.
    labelled = torch.tensor([[*tokens, tokens[0]]])
    drive(model.predict_further(hidden[None], labelled, TERMS, Inline(), model.empty_findings(hidden.device)))
    for hook in hooks:
        hook.remove()
    return [hidden, *normed]


def head(model: Transformer, states: Tensor) -> Tensor:
    with torch.no_grad():
        return model.lm_head(states)


def greedy_text(model: Transformer, prompt: list[int], num_new: int) -> list[int]:
    """The whole text through the forward pass of training again for every token."""
    tokens = list(prompt)
    for _ in range(num_new):
        tokens.append(int(head(model, main_states(model, tokens)[-1]).argmax()))
    return tokens[len(prompt) :]


@torch.no_grad()
def agreeing_model(config: ModelConfig, noise: float, seed: int) -> Transformer:
    """A model whose next token depends on the last one alone, which its depths know up to `noise`: drafts hold often.

    All layers add nothing, and a depth's projection takes the embedding's half.
    """
    model = build(config, seed=seed)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
            parameter.zero_()
        elif name.endswith("norm.weight"):
            parameter.fill_(1.0)
    generator = torch.Generator().manual_seed(seed)
    for depth in model.mtp:
        weight = depth.get_parameter("eh_proj.weight")
        weight.copy_(noise * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
        weight[:, : weight.shape[0]] += torch.eye(weight.shape[0], dtype=weight.dtype)
    return model
