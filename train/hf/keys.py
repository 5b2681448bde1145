"""What the keys of a foreign `config.json` mean here: understood, without effect on the model, or refused by name.

A key that nobody has looked at may change what a model computes, so it is refused as long as it stands in no table.
Tables and layouts together cover every attribute of Hugging Face's classes (`tests/test_foreign_config.py`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

# Keys that say nothing of what the weights compute, by the reason.
_WITHOUT_EFFECT = {
    "where the file comes from": "_name_or_path _commit_hash architectures auto_map transformers_version model_name",
    "the type in which a reader holds the weights; the files' own counts": "torch_dtype dtype",
    "which token is which, for tokenizers and generation": "bos_token_id eos_token_id pad_token_id sep_token_id "
    "decoder_start_token_id forced_bos_token_id forced_eos_token_id tokenizer_class prefix bad_words_ids "
    "suppress_tokens begin_suppress_tokens",
    "how a reader generates": "use_cache max_length min_length do_sample early_stopping num_beams num_beam_groups "
    "diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size num_return_sequences output_scores return_dict_in_generate remove_invalid_values "
    "exponential_decay_length_penalty",
    "what a reader returns, and how it computes": "return_dict output_hidden_states output_attentions torchscript "
    "use_bfloat16 tf_legacy_loss chunk_size_feed_forward is_decoder output_router_logits ep_size pretraining_tp "
    "attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal "
    "_experts_implementation _experts_implementation_internal use_flash_attention use_flash_attn",
    "another task's head, which a causal language model lacks": "finetuning_task id2label label2id num_labels "
    "problem_type task_specific_params classifier_dropout",
    "training: no dropout here, and losses of balance are the recipe's": "attention_dropout aux_loss_alpha seq_aux "
    "router_aux_loss_coef",
    "readers of these layouts work it out from the other keys": "qk_head_dim",
}
WITHOUT_EFFECT = {key: reason for reason, keys in _WITHOUT_EFFECT.items() for key in keys.split()}

# Keys that would change the model, and the values (the first is meant where the key is missing) under which they do
# not: for every layout, beside its own.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1.0, None),
}

# Other names of keys that are understood.
ALIASES = {
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
}


def in_our_names(body: Mapping[str, Any]) -> dict[str, Any]:
    """A file's keys by the names that layouts have for them. ValueError where one has two values."""
    found = dict(body)
    for alias, key in ALIASES.items():
        if alias in found:
            value = found.pop(alias)
            if found.get(key, value) != value:
                raise ValueError(f"{alias}={value} and {key}={found[key]} are two values of one thing: leave one")
            found[key] = value
    return found


def check_keys(body: Mapping[str, Any], understood: Collection[str], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """ValueError, naming key and value, for one that would change the model, or that nobody here has looked at."""
    for key, values in neutral.items():
        if body.get(key, values[0]) not in values:
            raise ValueError(
                f"{key}={_json(body[key])} cannot be imported: it must be {' or '.join(map(_json, values))}"
            )
    known = {*understood, *neutral, *WITHOUT_EFFECT}
    for key, value in body.items():
        if key not in known:
            raise ValueError(
                f"{key}={_json(value)} is not a key that is known here, so it may change what the model computes: take "
                "it out of a copy of the file if you know that it does not"
            )


def rope_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which newer files have together as `rope_parameters`.

    Raises ValueError for two that disagree, and for a key that changes the rotation in a way that is not known here.
    """
    given = {key: body[key] for key in ("rope_parameters", "rope_scaling") if body.get(key)}
    for key, value in given.items():
        if not isinstance(value, Mapping):
            raise ValueError(f"{key}={_json(value)} must be a mapping")
    read = [_rope(key, value) for key, value in given.items()]
    if len(read) == 2 and read[0][1] != read[1][1]:
        raise ValueError(f"rope_parameters={_json(body['rope_parameters'])} and rope_scaling="
                         f"{_json(body['rope_scaling'])} say different things: leave one")  # fmt: skip
    thetas = [theta for theta, _ in read if theta is not None]
    thetas += [body["rope_theta"]] if body.get("rope_theta") is not None else []
    if len(set(thetas)) > 1:
        raise ValueError(f"rope_theta is {' and '.join(map(_json, thetas))} in one file: leave one")
    return {"rope_theta": thetas[0] if thetas else None, "rope_scaling": read[0][1] if read else None}


# What changes nothing within rope_parameters under these values.
_ROPE_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1.0,), "truncate": (True,), "attention_factor": (None,)
}  # fmt: skip


def _rope(where: str, found: Mapping[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """(theta, YaRN's settings); other kinds of scaling and unknown keys of YaRN are refused with the model's."""
    found = dict(found)
    theta, kinds = found.pop("rope_theta", None), {found.pop(key) for key in ("rope_type", "type") if key in found}
    if len(kinds) > 1:
        raise ValueError(f"{where} is of the types {' and '.join(sorted(map(str, kinds)))} at once: leave one")
    for key, values in _ROPE_NEUTRAL.items():
        if found.get(key, values[0]) not in values:
            raise ValueError(f"{where}.{key}={_json(found[key])} cannot be imported: it must be {_json(values[0])}")
    stretch = {key: value for key, value in found.items() if value is not None and key not in _ROPE_NEUTRAL}
    kind = kinds.pop() if kinds else "default"
    if kind != "default":
        return theta, {"type": kind, **stretch}
    if stretch:
        raise ValueError(f"{where} has {', '.join(sorted(stretch))}, and no type that says what they do")
    return theta, None


def _json(value: Any) -> str:
    """A value as the file has it."""
    return json.dumps(value, ensure_ascii=False)
