"""The names on disk are those of the released checkpoint. (That they are a bijection: tests/test_export_family.py.)"""

from __future__ import annotations

from tests.train.model_cases import V3
from train.disk import layout


def test_the_names_of_the_released_checkpoint() -> None:
    """The index of the published weights lists these for the prediction layer, beside one set per expert."""
    tensors = [*layout(V3), *layout(V3, copies=True)]
    theirs = {disk.name for disk in tensors}
    last = {name.removeprefix("model.layers.61.") for name in theirs if name.startswith("model.layers.61.")}
    own = {name for name in last if not name.startswith(("mlp.", "self_attn."))}
    assert own == {
        "enorm.weight",
        "hnorm.weight",
        "eh_proj.weight",
        "shared_head.norm.weight",
        "shared_head.head.weight",
        "embed_tokens.weight",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
    assert sum(name.startswith("mlp.experts.") for name in last) == 3 * 256
    # 91,991 tensors on disk, of which the float8 ones come with a second tensor of scales.
    assert len(theirs) == len(tensors)
    assert len(theirs) + sum(disk.is_linear for disk in tensors) == 91_991
