"""One door for settings: every key has its help, every verb reads the same way, and what others call it is known."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from launch.__main__ import RUN, VERBS, main
from launch.settings import ExportSettings, ImportSettings, TimelineSettings
from train import compose
from train.cli import foreign_keys, refusals, usage
from train.config import RunConfig
from train.settings import CONFIGS, attributes, nearest, read, settings_of, summary

KINDS = [(kind, prefix) for kind, prefix in dict.fromkeys(pair for verb in VERBS.values() for pair in verb.settings)]


def dataclasses_of(kind: type) -> set[type]:
    """A dataclass of settings, its nested sections and its lists' items."""
    found = {kind}
    for hint in typing.get_type_hints(kind).values():
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                assert isinstance(inner, type)
                found |= dataclasses_of(inner)
    return found


ALL = sorted({each for kind, _ in KINDS for each in dataclasses_of(kind)}, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_field_has_its_help(kind: type) -> None:
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    hints, texts = typing.get_type_hints(kind), attributes(kind)
    plain = {field.name for field in dataclasses.fields(kind) if not dataclasses.is_dataclass(hints[field.name])}
    assert set(texts) == plain, "the docstring's `Attributes:` are the fields"
    for name, text in texts.items():
        assert text.endswith("."), f"{name}: {text}"


@pytest.mark.parametrize(("kind", "prefix"), KINDS, ids=lambda each: getattr(each, "__name__", each))
def test_help_is_a_sentence_that_fits(kind: type, prefix: str) -> None:
    for setting in settings_of(kind, prefix):
        assert setting.help and len(setting.help) < 160, setting.key
        assert setting.text.startswith(setting.help)
    for line in usage.keys_help(kind, prefix):
        assert len(line) <= usage.WIDTH, line


def test_a_section_says_its_name_and_what_it_is() -> None:
    for name, kind in typing.get_type_hints(RunConfig).items():
        assert (kind.__doc__ or "").startswith(f"`{name}`: "), name
        assert 10 < len(summary(kind)) < 90


def test_attributes_are_read_across_lines() -> None:
    @dataclass(frozen=True)
    class Kind:
        """`kind`: of thing.

        Attributes:
            first: one line.
            second: two
                lines: with a colon. And a second sentence.

        What follows is no attribute:
            third: not one.
        """

        first: int = 0
        second: str = ""

    assert attributes(Kind) == {"first": "one line.", "second": "two lines: with a colon. And a second sentence."}
    first, second = settings_of(Kind)
    assert (first.help, second.help) == ("one line", "two lines: with a colon")


# --- help and trees, as people call them ---


def python(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_launch_helps(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 0
    said = capsys.readouterr().out
    for name, verb in VERBS.items():
        assert re.search(rf"^  {name} +{re.escape(verb.summary)}$", said, re.M)
    assert main([]) == 2 and "usage:" in capsys.readouterr().err
    assert main(["expor"]) == 2 and "did you mean export?" in capsys.readouterr().err


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_helps(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "key=value", "--help"]) == 0
    said = capsys.readouterr().out
    for kind, prefix in VERBS[name].settings:
        for setting in settings_of(kind, prefix):
            assert f"  {setting.key}  {setting.type}" in said, setting.key
    for group, files in refusals.groups().items() if VERBS[name].takes_a_run else ():
        assert re.search(rf"^  {group} +", said, re.M) and all(file in said for file in files)


def test_train_helps() -> None:
    result = python("train", "--help")
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.startswith("usage: python -m train") and "lr_scheduler.lr  float = 0.003" in result.stdout
    assert "docs/config.md" in result.stdout and "python -m launch config" in result.stdout


def test_config_prints_what_a_run_would_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "model=small", "train.max_steps=3"]) == 0
    said = capsys.readouterr().out
    (tmp_path / "config.yaml").write_text(said)
    config = compose.compose(["model=small", "train.max_steps=3"])
    assert said == compose.text(config) and compose.load(tmp_path / "config.yaml") == config
    assert main(["config", "model=smal"]) == 2


@pytest.mark.parametrize("verb", ["local", "prepare", "schedule", "train"])
def test_the_composed_tree_as_hydra_shows_it(
    verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([verb, "run.name=mine", "--cfg", "job"]) == 0
    assert "dir: runs/${run.name}" in capsys.readouterr().out
    assert main([verb, "--cfg=job", "run.name=mine", "--resolve"]) == 0
    assert "dir: runs/mine" in capsys.readouterr().out
    assert main([verb, "--cfg", "all"]) == 2 and "only --cfg job" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- a resolved file, changed ---


def test_keys_override_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(compose.text(compose.compose(["model=small", "run.name=first", "train.seed=7"])))
    assert compose.compose(["--config", str(file)]) == compose.load(file)
    changed = compose.compose(["run.dir=elsewhere", "--config", str(file), "lr_scheduler.phases=[]", "model.n_group=2"])
    assert (changed.run.name, changed.run.dir, changed.train.seed) == ("first", "elsewhere", 7)
    assert changed.lr_scheduler.phases == [] and changed.model.n_group == 2
    assert (
        compose.compose([f"--config={file}", "lr_scheduler.phases.0.share=0.25"]).lr_scheduler.phases[0].share == 0.25
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model=tiny"], "model=tiny chooses a file of configs/model"),
        (["train.sed=1"], "train.sed is not a key of the config; did you mean train.seed?"),
        (["train.seed=x"], "train.seed: Value 'x'"),
        (["train.seed=1,2"], "has several values"),
    ],
)
def test_a_file_is_changed_by_keys_alone(words: list[str], sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(compose.text(compose.compose([])))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        compose.compose(["--config", str(file), *words])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read: No such file or directory"),
        ("a: [", "is no YAML"),
        ("- 1", "holds no config"),
        ("train: {sed: 1}", "train.sed is not a key of the config; did you mean train.seed?"),
    ],
)
def test_a_file_that_is_none(content: str | None, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        compose.compose(["--config", str(file)])
    with pytest.raises(ValueError, match="--config needs FILE"):
        compose.compose(["--config"])


# --- what follows from other keys ---


@pytest.mark.parametrize(
    ("words", "ranks", "found"),
    [
        ("", None, (1, 1, "local")),
        ("parallel.ep=2", None, (2, 1, "flat")),
        ("parallel.ep=2 parallel.dp=4", None, (4, 1, "flat")),
        ("parallel.ep=4 parallel.nodes=2", None, (4, 2, "two_hop")),
        ("parallel.ep=2 parallel.dp=4 parallel.nodes=2", None, (4, 2, "two_hop")),
        ("parallel.ep=2 parallel.dispatch=two_hop", None, (2, 1, "two_hop")),
        ("", (4, 4), (4, 1, "local")),
        ("parallel.pp=2", (4, 4), (2, 1, "local")),
        ("parallel.ep=8", (8, 4), (8, 2, "two_hop")),
        ("parallel.ep=4 parallel.pp=2", (8, 4), (4, 2, "two_hop")),
        ("parallel.dp=2", (4, 4), (2, 1, "local")),
    ],
)
def test_ranks_follow(
    words: str, ranks: tuple[int, int] | None, found: tuple[int, int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), ranks or ("", ""), strict=True):
        monkeypatch.setenv(name, str(value)) if value else monkeypatch.delenv(name, raising=False)
    parallel = compose.compose(words.split()).parallel
    assert (parallel.dp, parallel.nodes, parallel.dispatch) == found


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("model=small", "data.vocab_size", 4096),
        ("precision=fp64", "zero.engine", "native"),
        ("precision=bf16", "zero.engine", "deepspeed"),
        ("precision=bf16 zero.engine=native", "zero.engine", "native"),
        ("pipeline.schedule=interleaved_1f1b parallel.pp=2", "pipeline.stages_per_rank", 2),
        ("pipeline.schedule=interleaved_1f1b parallel.pp=2 pipeline.stages_per_rank=3", "pipeline.stages_per_rank", 3),
        ("pipeline.schedule=zbv parallel.pp=2", "pipeline.stages_per_rank", None),
        ("model=deepseek_v2", "moe.bias_update_rate", 0.0),
        ("model=tiny", "moe.bias_update_rate", 0.01),
        ("model=tiny_dense model.num_hidden_layers=4", "model.first_k_dense_replace", 4),
        ("run.name=mine", "run.dir", "runs/mine"),
    ],
)
def test_values_follow(words: str, key: str, value: object) -> None:
    section, name = key.split(".")
    assert getattr(getattr(compose.compose(words.split()), section), name) == value


# --- what it is called elsewhere ---


def test_every_foreign_name_leads_to_a_key_that_exists() -> None:
    known = {*refusals.keys(), *refusals.groups()}
    for ours in foreign_keys.CALLED:
        assert ours in known, ours
    for sentence in [*foreign_keys.ANSWERED, *foreign_keys.OLD_GROUPS.values()]:
        sections = {key.partition(".")[0] for key in known}
        for key in re.findall(r"(?<![/\w])[a-z_]+\.[a-z_]+[a-z_.0-9]*[a-z0-9]", sentence):
            assert key in known or key.partition(".")[0] not in sections or key == "config.yaml", (
                f"{key} in: {sentence}"
            )
        for name, choice in re.findall(r"\b([a-z_]+)=(\w+)", sentence):
            if name in refusals.groups() and not choice.isupper():
                assert (CONFIGS / name / f"{choice}.yaml").exists(), f"{name}={choice} in: {sentence}"


FOREIGN = [
    name for table in (foreign_keys.CALLED, foreign_keys.ANSWERED) for names in table.values() for name in names.split()
]


def test_every_foreign_name_stands_once_and_is_none_of_ours() -> None:
    assert sorted(FOREIGN) == sorted(set(FOREIGN))
    assert len(FOREIGN) > 250
    ours = {*refusals.keys(), *refusals.groups(), *typing.get_type_hints(RunConfig)}
    for name in FOREIGN:
        assert name == name.lower() and "-" not in name and name not in ours, name


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_name_is_answered_however_it_is_written(name: str) -> None:
    for words in ([f"{name}=8"], [f"--{name.replace('_', '-')}", "8"], [f"--{name}=8"]):
        if name == "m" or (name == "multirun" and words[0].startswith("--")):
            continue
        with pytest.raises(ValueError, match=r"is called [a-z_.0-9]+ here|: ") as caught:
            compose.compose(words)
        said = str(caught.value)
        assert len(said.splitlines()) == 1 and len(said) < 400
        assert foreign_keys.answer(name)[1].split(maxsplit=1)[1] in said or "section" in said, said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("optimizer.lr=3e-4", "optimizer.lr is called lr_scheduler.lr here: lr_scheduler.lr=3e-4"),
        ("optim.lr=3e-4", "lr_scheduler.lr=3e-4"),
        ("lr=3e-4", "lr_scheduler.lr=3e-4"),
        ("--lr 3e-4", "lr_scheduler.lr=3e-4"),
        ("learning_rate=3e-4", "lr_scheduler.lr=3e-4"),
        ("parallel.tp=2", "tensor parallelism is absent by choice"),
        ("tensor_parallel_size=2", "tensor parallelism is absent by choice"),
        ("--tensor-model-parallel-size 8", "tensor parallelism is absent by choice"),
        ("context_parallel_size=2", "context parallelism is absent by choice"),
        ("train.steps=100", "train.max_steps=100"),
        ("--training.steps=100", "train.max_steps=100"),
        ("train.batch_size=8", "train.global_batch_size=8"),
        ("--micro-batch-size 1", "train.micro_batch_size=1"),
        ("--pipeline-model-parallel-size 4", "parallel.pp=4"),
        ("parallelism.expert_parallel_degree=8", "parallel.ep=8"),
        ("optim.sched.min_lr=1e-5", "lr_scheduler.phases=["),
        ("zero_optimization.stage=1", "zero.engine"),
        ("--attention-dropout 0.1", "dropout is absent by choice"),
        ("--train.seq_len 64", "settings are written without dashes, train.seq_len=64"),
        ("--optimizer adam", "optimizer.beta1"),
        ("--nonsense", "--config FILE"),
        ("-m train.seed=1,2", "python -m launch local --multirun"),
    ],
)
def test_what_people_type(words: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        compose.compose(words.split())


def test_hints_prefer_the_same_word_in_another_section() -> None:
    known = ["train.seed", "data.seed", "train.seq_len", "lr_scheduler.phases[].lr", "lr_scheduler.lr"]
    assert nearest("lr", known) == ["lr_scheduler.lr"]
    assert nearest("seed", known) == ["train.seed", "data.seed"]
    assert nearest("train.seqlen", known) == ["train.seq_len"]
    assert nearest("unlike.anything", known) == []


# --- the one reader of verbs ---


@dataclass(frozen=True)
class Inner:
    """`inner`: nested.

    Attributes:
        f: a number.
    """

    f: float | None = None


@dataclass(frozen=True)
class Kind:
    """`kind`: of all types.

    Attributes:
        from_: a path that must be given.
        count: whole.
        share: a number.
        switch: on or off.
        many: several.
        word: as it is.
    """

    from_: Path
    count: int = 1
    share: float = 0.5
    switch: bool = False
    many: list[Path] = field(default_factory=list)
    word: str | None = None
    inner: Inner = field(default_factory=Inner)


def test_words_become_values() -> None:
    words = ["from=a/b", "count=5e3", "share=2", "switch=True", "many=x", "many=y", "inner.f=1e-3"]
    assert read(Kind, [*words, "word={not: yaml"], "kind") == Kind(
        Path("a/b"), 5000, 2.0, True, [Path("x"), Path("y")], "{not: yaml", Inner(1e-3)
    )
    assert read(Kind, ["k.from=a", "k.count=1234567890123456789"], "kind", "k.").count == 1234567890123456789
    assert read(Kind, ["from=a", "word=null"], "kind").word is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "from=... is missing: kind needs from"),
        ("from", "from cannot be read as key=value"),
        ("from=", "from is empty: it needs a value, from=..."),
        ("from=a from=b", "from is given twice"),
        ("from=a cont=3", "cont is not a key of kind; did you mean count?"),
        ("from=a zzzzz=3", "zzzzz is not a key of kind: it takes from, count, share, switch, many, word, inner.f"),
        ("from=a f=3", "f is not a key of kind; did you mean inner.f?"),
        ("from=a count=2.5", "count=2.5 must be a whole number"),
        ("from=a count=inf", "count=inf must be a whole number"),
        ("from=a count=two", "count=two must be a whole number"),
        ("from=a share=much", "share=much must be a number"),
        ("from=a switch=yes", "switch=yes must be true or false"),
        ("from=a inner.f=x", "inner.f=x must be a number"),
    ],
)
def test_words_are_refused(words: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read(Kind, words.split(), "kind")


def test_verbs_read_their_settings() -> None:
    assert read(ExportSettings, ["checkpoint=a", "to=b"], "export") == ExportSettings(Path("a"), Path("b"))
    assert read(ImportSettings, ["from=a", "to=b"], "import").from_ == Path("a")
    timeline = read(
        TimelineSettings, ["pipeline.schedule=zbv", "parallel.pp=4", "pipeline.num_micro_batches=8"], "timeline"
    )
    assert (timeline.pipeline.schedule, timeline.parallel.pp, timeline.has_shape) == ("zbv", 4, True)
    assert [name for name, verb in VERBS.items() if RUN in verb.settings] == [
        "local",
        "slurm",
        "train",
        "config",
        "prepare",
        "schedule",
        "plan",
    ]
