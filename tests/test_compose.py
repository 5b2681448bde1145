"""The config tree: every file composes, every key is known, every mistake is one sentence naming field, value, rule."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from train import compose
from train.cli import refusals
from train.config import RunConfig
from train.flops import parameter_counts
from train.model.transformer import Transformer
from train.precision.build import everywhere
from train.precision.torch_engine import TorchEngine
from train.settings import CONFIGS, defaults, settings_of

FILES = sorted(Path(group, name) for group, names in refusals.groups().items() for name in names)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_composes_and_reads_back(file: Path, tmp_path: Path) -> None:
    # One cannot stand alone: 64-way experts need a model that has them.
    needs = {"parallel/v3_h800_2048": ["experiment=v3_h800_2048"]}
    config = compose.compose([f"{file.parent}={file.name}", *needs.get(str(file), [])])
    (tmp_path / "config.yaml").write_text(compose.text(config))
    assert compose.load(tmp_path / "config.yaml") == config


DICTIONARIES = {each.key for each in settings_of(RunConfig) if each.type.startswith("dict")}


def keys_of_tree(tree: Any, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in DICTIONARIES:
            yield from keys_of_tree(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.mark.parametrize("settings", [[], ["experiment=first_run"], ["experiment=v3_h800_2048"]], ids=str)
def test_the_tree_holds_every_key_of_the_dataclasses_and_no_other(settings: list[str]) -> None:
    tree = OmegaConf.to_container(compose.raw(settings), resolve=True)
    assert isinstance(tree, dict)
    assert set(keys_of_tree(tree)) == {each.key for each in settings_of(RunConfig) if "[]" not in each.key}


def test_defaults_are_those_of_the_dataclasses(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m train` without a word takes what each dataclass says; only a model's sizes come from its file."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    composed = compose.compose([])
    for name, kind in typing.get_type_hints(RunConfig).items():
        if name != "model":
            assert getattr(composed, name) == kind(), name
    sizes, own = dataclasses.asdict(composed.model), defaults(RunConfig)["model"]
    given = {key for key, value in sizes.items() if own[key] != value}
    assert given < set(OmegaConf.load(CONFIGS / "model" / "tiny.yaml"))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_group_sets_the_section_of_its_name(file: Path) -> None:
    """Experiments alone set several; what a file says of its model's size is right."""
    text = (CONFIGS / file).with_suffix(".yaml").read_text()
    assert text.startswith("# @package _global_\n") == (str(file.parent) == "experiment")
    assert text.startswith("# "), "no comment says what it is"
    if str(file.parent) != "experiment":
        assert str(file.parent) in own_sections()
        return
    sections = set(OmegaConf.load((CONFIGS / file).with_suffix(".yaml"))) - {"defaults"}
    assert sections <= own_sections()


def own_sections() -> set[str]:
    return {field.name for field in dataclasses.fields(RunConfig)}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_file_says_nothing_that_is_so_without_it(file: Path) -> None:
    """No value of a file repeats its dataclass's default, but for the names of what the file is, and where the default
    is a part of what is published."""
    if str(file.parent) in ("experiment", "model"):
        return
    own = defaults(RunConfig)[str(file.parent)]
    tree = OmegaConf.to_container(OmegaConf.load((CONFIGS / file).with_suffix(".yaml")))
    assert isinstance(tree, dict)
    repeated = {key for key, value in tree.items() if key in own and own[key] == value}
    assert repeated <= {"name", "pp", "ep", "source", "document_mask"}


SIZE = re.compile(r"([\d.]+) ([MB]) (parameters|activated)")
SIZES = [(file, *found) for file in FILES for found in SIZE.findall((CONFIGS / file).with_suffix(".yaml").read_text())]


def test_sizes_are_stated_where_models_are() -> None:
    assert {file.name for file, *_ in SIZES} == {file.name for file in FILES if str(file.parent) == "model"}


@pytest.mark.parametrize(("file", "stated", "unit", "what"), SIZES, ids=lambda value: str(value))
def test_a_stated_size_is_right(file: Path, stated: str, unit: str, what: str) -> None:
    """To the digits that are stated, which a report may round or cut. DeepSeekMoE's activated count the embedding."""
    counts = parameter_counts(compose.compose([f"model={file.name}"]).model)
    activated = counts.activated + counts.embedding * (file.name == "deepseek_moe_16b")
    count = (counts.total if what == "parameters" else activated) / {"M": 1e6, "B": 1e9}[unit]
    assert abs(count - float(stated)) < 10.0 ** -len(stated.partition(".")[2])


MISTAKES = [
    # (settings, words of the sentence): typos
    ("train.sequence_len=64", "train.sequence_len", "train.seq_len"),
    ("optimizer.weigth_decay=0.1", "optimizer.weigth_decay", "optimizer.weight_decay"),
    ("modle=tiny", "modle", "model"),
    ("+train.extra=1", "train.extra", ""),
    ("train.seq_len.deeper=1", "train.seq_len.deeper", ""),
    ("model.hidden_sise=64", "model.hidden_sise", "did you mean model.hidden_size?"),
    ("hidden_size=64", "hidden_size", "did you mean model.hidden_size?"),
    ("hiden_size=64", "hiden_size", "did you mean model.hidden_size?"),
    ("train.batch_ramp.strat=4", "train.batch_ramp.strat", "did you mean train.batch_ramp.start?"),
    ("train={seq_lne: 3}", "train.seq_lne", "did you mean train.seq_len?"),
    ("data.blend=[{nam: a, weight: 1}]", "data.blend[0].nam", "did you mean data.blend[].name?"),
    ("lr_scheduler.phases=[{kind: constant, shar: 1}]", "lr_scheduler.phases[0].shar", "lr_scheduler.phases[].share?"),
    ("lr_scheduler.phases.0.knd=linear", "lr_scheduler.phases.0.knd", "did you mean lr_scheduler.phases[].kind?"),
    ("mtp.loss_weight_changes=[{from: 3, loss_weight: 1}]", "mtp.loss_weight_changes[0].from", "from_tokens?"),
    ("seed=3", "seed is not", "data.seed or train.seed?"),
    ("run.zzz=1", "run.zzz", "run.hang_timeout_s"),
    ("zzz.y=1", "zzz.y", "its sections are model, run, parallel"),
    # Hydra's own spellings
    ("+train.seqlen=64", "train.seqlen", "did you mean train.seq_len?"),
    ("++train.seqlen=64", "train.seqlen", "did you mean train.seq_len?"),
    ("~train.seqlen", "train.seqlen", "did you mean train.seq_len?"),
    ("+train.seq_len=64", "+train.seq_len=64", "set without a +: train.seq_len=64"),
    ("~train.seq_len", "~train.seq_len", "train.seq_len=VALUE"),
    ("+experiment=first_run", "+experiment=first_run", "without a +: experiment=first_run"),
    ("++model=small", "++model=small", "without a +: model=small"),
    ("train.seed=1,2", "train.seed=1,2 has several values", "--multirun"),
    # groups
    ("optim=v3", "optim is no group any more", "lr_scheduler=NAME"),
    ("checkpoint=default", "checkpoint is a section", "checkpoint.interval"),
    ("track=default", "track is a section", "track.wandb"),
    ("experiment=null", "experiment=null", "first_run"),
    ("model=huge", "model=huge", "tiny"),
    ("precision=fp4", "precision=fp4", "fp64, fp8"),
    ("precision.power_of_two_scales=true", "precision.power_of_two_scales=true", "precision=fp8"),
    ("precision=fp8 precision.modules.o_proj=fp4", "precision.modules.o_proj=fp4", "fp8, bf16"),
    ("precision=fp8 precision.modules.oproj=bf16", "precision.modules.oproj", "is not a key"),
    ("precision=fp8 +precision.modules.oproj=bf16", "precision.modules.oproj", "attention, o_proj, mlp"),
    ("precision=fp8 ~precision.modules.o_proj", "precision.modules.o_proj is missing", "fp8 or bf16"),
    ("+precision.modules.o_proj=fp8", "precision.modules.o_proj", "precision=fp8"),
    ("experiment=unknown", "experiment=unknown", "first_run"),
    # types
    ("train.seq_len=long", "train.seq_len", "long"),
    ("train.seq_len=1.5", "train.seq_len", "1.5"),
    ("optimizer.beta1=yes_please", "optimizer.beta1", "yes_please"),
    ("run.deterministic=perhaps", "run.deterministic", "perhaps"),
    ("train.seq_len=null", "train.seq_len", ""),
    # not a setting at all
    ("train.seq_len", "train.seq_len", ""),
    ("train.seq_len=[1", "train.seq_len=[1", ""),
    # rules of one room
    ("train.seq_len=0", "train.seq_len=0", "below 1"),
    ("zero.engine=fsdp", "zero.engine=fsdp", "native"),
    ("checkpoint.interval=-1", "checkpoint.interval=-1", "negative"),
    ("track.wandb=maybe", "track.wandb=maybe", "offline"),
    ("parallel.dispatch=ring", "parallel.dispatch='ring'", "two_hop"),
    ("pipeline.schedule=gpipe", "pipeline.schedule=gpipe", "dualpipe"),
    ("run.device=tpu", "run.device=tpu", "cuda"),
    ("run.num_threads=0", "run.num_threads=0", "at least 1"),
    ("evaluate.num_sequences=0", "evaluate.num_sequences=0", "at least 1"),
    ("data.valid_fraction=2", "data.valid_fraction=2", "0..1"),
    ("data.valid_fraction=1", "data.valid_fraction=1", "below 1"),
    ("evaluate.patience=0", "evaluate.patience=0", "at least 1"),
    ("evaluate.min_improvement=-1", "evaluate.min_improvement=-1", "at least 0"),
    ("evaluate.prompt_tokens=0", "evaluate.prompt_tokens=0", "at least 1"),
    ('evaluate.prompts=[""]', "evaluate.prompts", "at least one token"),
    ("data.valid_sources=[{name: a/b, source: x}]", "data.valid_sources", "a name is letters"),
    ("data.valid_sources=[{name: a, source: ''}]", "data.valid_sources", "a is empty"),
    ("data.valid_sources=[{name: a, source: x, settings: {valid_fraction: 0.5}}]", "valid_fraction=0.5", "holds for"),
    ("data.valid_sources=[{name: a, source: x},{name: a, source: y}]", "data.valid_sources", "name each once"),
    # rules between rooms
    ("parallel.dp=4 parallel.ep=3", "parallel.ep=3", "parallel.dp=4"),
    ("parallel.dp=3", "parallel.dp=3", "train.global_batch_size"),
    ("train.seq_len=8192", "train.seq_len=8192", "model.max_position_embeddings=4096"),
    ("train.seq_len=1", "train.seq_len=1", "model.num_nextn_predict_layers=1"),
    ("data.vocab_size=5000", "data.vocab_size=5000", "model.vocab_size=2048"),
    ("precision=fp64 zero.engine=deepspeed", "zero.engine=deepspeed", "precision=fp64"),
    ("data.valid_fraction=0", "data.valid_fraction=0", "evaluate"),
    ("train.micro_batch_size=3", "train.micro_batch_size=3", "multiple"),
    (
        "parallel.dp=16 parallel.ep=16 train.micro_batch_size=1 parallel.dispatch=flat model.n_routed_experts=24",
        "",
        "16",
    ),
    ("model.n_group=5", "model.n_group=5", "model.n_routed_experts=16"),
    ("model.topk_group=9", "model.topk_group=9", ""),
    ("model.scoring_func=relu", "model.scoring_func=relu", "sigmoid, softmax"),
    ("model.topk_method=best", "model.topk_method=best", "group_limited_greedy"),
    ("model.topk_method=greedy", "model.topk_group=2", "model.n_group=4"),
    ("model.topk_method=group_limited_greedy moe.bias_update_rate=0.001", "moe.bias_update_rate=0.001", "noaux_tc"),
    ("model.n_group=1 model.topk_group=1 moe.device_aux_coeff=0.05", "moe.device_aux_coeff=0.05", "model.n_group"),
    ("model.n_group=1 model.topk_group=1 moe.comm_aux_coeff=0.02", "moe.comm_aux_coeff=0.02", "model.n_group"),
    ("moe.comm_aux_coeff=-1", "moe.comm_aux_coeff=-1", "0 or more"),
    ("parallel.dp=2 parallel.ep=2 parallel.dispatch=local", "parallel.dispatch=local", "parallel.ep=1, not 2"),
    ("model=tiny_dense parallel.dp=2 parallel.ep=2 parallel.dispatch=flat", "parallel.ep=2", "n_routed_experts=0"),
    ("model=tiny_dense recompute.mla_up_proj=true", "recompute.mla_up_proj=true", "model.attention=gqa"),
    ("model=tiny_dense recompute.experts_up_proj=true", "recompute.experts_up_proj=true", "n_routed_experts=0"),
    ("recompute.experts_up_proj=true recompute.nodes=[experts]", "recompute.experts_up_proj=true", "runs experts"),
    ("model=tiny_dense recompute.nodes=[attention]", "recompute.nodes=", "no MoE layer"),
    ("recompute.nodes=[dense] model.first_k_dense_replace=0", "recompute.nodes=", "no dense layer"),
    ("model.n_routed_experts=0", "model.first_k_dense_replace=1", "model.num_hidden_layers=8"),
    ("model.n_routed_experts=null", "model.n_routed_experts", ""),
]


@pytest.mark.parametrize(("settings", "field", "rule"), MISTAKES, ids=[each[0] for each in MISTAKES])
def test_a_mistake_is_one_sentence(settings: str, field: str, rule: str) -> None:
    with pytest.raises(ValueError) as caught:
        compose.compose(re.split(r" (?=[+~]*[\w.]+(?:=|$))", settings))
    said = str(caught.value)
    assert field in said and rule in said, said
    assert len(said.splitlines()) == 1 and len(said) < 400, said


@pytest.mark.parametrize(("name", "lr", "batch"), [("7b", 4.2e-4, 2304), ("67b", 3.2e-4, 4608)])
def test_the_steps_of_deepseek_llm(name: str, lr: float, batch: int) -> None:
    """2000 steps to the largest rate, 31.6 % of it after 80 % of 2 T tokens, 10 % after 90 %."""
    schedule = compose.compose([f"experiment=deepseek_llm_{name}"]).recipe()
    tokens_each, trillion = batch * 4096, 10**12

    def rate(tokens: int) -> float:
        return schedule.at(schedule.step_at(tokens)).lr

    assert schedule.at(999).lr == pytest.approx(lr / 2)
    assert schedule.at(1998).lr < schedule.at(1999).lr == lr
    first, second = 16 * trillion // 10, 18 * trillion // 10
    assert rate(first - tokens_each) == lr
    assert rate(first) == rate(second - tokens_each) == pytest.approx(0.316 * lr)
    assert rate(second) == schedule.at(schedule.num_steps - 1).lr == pytest.approx(0.1 * lr)
    assert schedule.num_steps == -(-2 * trillion // tokens_each)
    assert {schedule.at(step).num_sequences for step in (0, schedule.num_steps - 1)} == {batch}


def test_the_published_run() -> None:
    """DeepSeek-V3 report, sections 3 and 4.2."""
    config = compose.compose(["experiment=v3_h800_2048"])
    assert (config.parallel.pp, config.parallel.ep, config.parallel.pp * config.parallel.dp) == (16, 64, 2048)
    assert config.parallel.nodes * 8 == 2048
    model = config.model
    assert (model.num_hidden_layers, model.hidden_size, model.first_k_dense_replace) == (61, 7168, 3)
    assert (model.n_routed_experts, model.num_experts_per_tok, model.n_shared_experts) == (256, 8, 1)
    assert (model.num_attention_heads, model.kv_lora_rank, model.q_lora_rank) == (128, 512, 1536)
    assert (model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim) == (128, 64, 128)
    assert (model.moe_intermediate_size, model.num_nextn_predict_layers, model.initializer_range) == (2048, 1, 0.006)
    # A token goes to at most 4 of the 8 nodes of its expert group.
    assert (model.n_group, model.topk_group) == (8, 4)
    assert config.train.max_tokens == 14_800_000_000_000 and config.train.seq_len == 4096
    assert (config.optimizer.beta1, config.optimizer.beta2, config.optimizer.weight_decay) == (0.9, 0.95, 0.1)
    assert config.optimizer.clip_grad_norm == 1.0 and config.optimizer.moments_dtype == "bf16"
    assert config.moe.seq_aux_coeff == 0.0001


@pytest.mark.parametrize(
    ("tokens", "lr", "sequences", "gamma", "mtp"),
    [
        # Warmed up, the batch still growing; then 15360 sequences from 469 B on.
        (0.2e12, 2.2e-4, None, 0.001, 0.3),
        (0.47e12, 2.2e-4, 15360, 0.001, 0.3),
        (9.99e12, 2.2e-4, 15360, 0.001, 0.3),
        # The cosine's middle, its MTP weight of 0.1, and its end.
        (12.15e12, (2.2e-4 + 2.2e-5) / 2, 15360, 0.001, 0.1),
        (14.299e12, 2.2e-5, 15360, 0.001, 0.1),
        (14.31e12, 2.2e-5, 15360, 0.0, 0.1),
        (14.632e12, 2.2e-5, 15360, 0.0, 0.1),
        (14.634e12, 7.3e-6, 15360, 0.0, 0.1),
        (14.799e12, 7.3e-6, 15360, 0.0, 0.1),
    ],
)
def test_the_published_recipe(tokens: float, lr: float, sequences: int | None, gamma: float, mtp: float) -> None:
    schedule = compose.compose(["experiment=v3_h800_2048"]).recipe()
    plan = schedule.at(schedule.step_at(int(tokens)))
    # The report gives two digits; a step is 63 M tokens of 4.3 T.
    assert plan.lr == pytest.approx(lr, rel=1e-3)
    assert (plan.bias_update_rate, plan.mtp_loss_weight) == (gamma, mtp)
    if sequences is None:
        assert 3072 < plan.num_sequences < 15360
    else:
        assert plan.num_sequences == sequences


def test_the_published_warm_up_and_end() -> None:
    schedule = compose.compose(["experiment=v3_h800_2048"]).recipe()
    assert schedule.at(0).num_sequences == 3072
    # 2000 steps, converted to tokens through the growing batch.
    assert schedule.at(1999).lr == pytest.approx(2.2e-4) and schedule.at(1990).lr < 2.2e-4
    last = schedule.at(schedule.num_steps - 1)
    assert 14.8e12 <= last.consumed_tokens < 14.8e12 + 15360 * 4096


class AllExperts:
    """What a model without memory needs to know of dispatch: that every expert is here."""

    first_expert = 0

    def __init__(self, num_experts: int) -> None:
        self.num_local_experts = num_experts


def test_the_published_sizes() -> None:
    """The released checkpoint: main model and router biases; the prediction module, less what it shares, apart."""
    config = compose.compose(["model=v3_671b"]).model
    with torch.device("meta"):
        model = Transformer(config, AllExperts(config.n_routed_experts), everywhere(TorchEngine(torch.device("meta"))))
    names = dict(model.named_parameters())
    main = sum(param.numel() for name, param in names.items() if not name.startswith("mtp."))
    prediction = sum(param.numel() for name, param in names.items() if name.startswith("mtp."))
    biases = [bias for name, bias in model.named_buffers() if name.endswith("e_score_correction_bias")]
    main_biases = sum(b.numel() for n, b in model.named_buffers() if n.startswith("layers.") and n.endswith("_bias"))
    assert main == 671_026_404_352
    assert main_biases == 14_848 and len(biases) == 58 + 1
    assert round(prediction / 1e9, 3) == 11.610
