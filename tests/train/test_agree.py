"""What ranks must have in common: settings, code, libraries, devices, folders, tokens; and who decides the rest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from parallel.meeting import Meeting, meet
from tests.runs import SMALL, prepare_text
from tests.spawn import STOP_S, Ranks
from train import agree, compose

# What rank 0 types, what rank 1 types, and the phrase about it.
DIFFER = [
    ("lr_scheduler.lr=0.003", "lr_scheduler.lr=0.3", "lr_scheduler.lr is 0.003 on rank 0 and 0.3 on rank 1"),
    ("train.seed=0", "train.seed=7", "train.seed is 0 on rank 0 and 7 on rank 1"),
    ("optimizer.clip_grad_norm=1.0", "optimizer.clip_grad_norm=0.5", "optimizer.clip_grad_norm is 1.0 on rank 0 and"),
    ("optimizer.weight_decay=0.1", "optimizer.weight_decay=0", "optimizer.weight_decay is 0.1 on rank 0 and 0 on"),
    ("moe.seq_aux_coeff=0.0001", "moe.seq_aux_coeff=0.01", "moe.seq_aux_coeff is 0.0001 on rank 0 and 0.01 on rank 1"),
    (
        "model.routed_scaling_factor=2.5",
        "model.routed_scaling_factor=1",
        "model.routed_scaling_factor is 2.5 on rank 0",
    ),
    ("model.num_experts_per_tok=2", "model.num_experts_per_tok=3", "model.num_experts_per_tok is 2 on rank 0 and 3"),
    (
        "train.global_batch_size=4",
        "train.global_batch_size=8",
        "train.global_batch_size is 4 on rank 0 and 8 on rank 1",
    ),
    ("precision=fp32", "precision=bf16", "precision.name is fp32 on rank 0 and bf16 on rank 1"),
    ("parallel.ep=1", "parallel.ep=2", "parallel.ep is 1 on rank 0 and 2 on rank 1"),
    ("data.document_mask=false", "data.document_mask=true", "data.document_mask is false on rank 0 and true on rank 1"),
    ("run.num_threads=null", "run.num_threads=1", "run.num_threads is null on rank 0 and 1 on rank 1"),
    ("run.name=a", "run.name=b", "run.name is a on rank 0 and b on rank 1"),
    (
        "lr_scheduler.phases=[]",
        "lr_scheduler.phases=[{kind:constant}]",
        """lr_scheduler.phases is [] on rank 0 and [{"kind": "constant"}] on rank 1""",
    ),
]


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


def alike(meeting: Meeting, settings: list[str]) -> Any:
    return agree.same_run(meeting, compose.compose(settings), lambda: compose.asked(settings))


@contextmanager
def other_code(kind: str) -> Iterator[None]:
    """On rank 1 a file has another text, or a library another version."""
    code, version = agree._code, metadata.version
    odd = {"the text of train/loop.py": "0"} if kind == "train/loop.py" else {}
    with (
        mock.patch.object(agree, "_code", lambda: {**code(), **odd}),
        mock.patch.object(metadata, "version", lambda name: "9.9" if name == kind else version(name)),
    ):
        yield


def compares() -> list[Any]:
    rank, found = int(os.environ["RANK"]), list[Any]()
    with meet(rank, 2, STOP_S, print, end_hung=print) as meeting:
        meeting.come()
        for case in DIFFER:
            found.append(refusal(lambda case=case: alike(meeting, [*SMALL, "parallel.dp=2", case[rank]])))  # type: ignore[misc]
        everything = [case[rank] for case in DIFFER]
        found.append(refusal(lambda: alike(meeting, [*SMALL, "parallel.dp=2", *everything])))
        for kind in ("train/loop.py", "torch"):
            with other_code(kind if rank else ""):
                found.append(refusal(lambda: alike(meeting, SMALL)))
        found.append(refusal(lambda: agree.same_device(meeting, lambda: ["cpu", "cuda"][rank])))
        # Typed alike, and it follows otherwise: the time, the environment, what a launcher says of the machine.
        os.environ["WHO_AM_I"] = f"rank{rank}"
        typed = [*SMALL, "run.name=${oc.env:WHO_AM_I}-${now:%H-%M-%S-%f}"]
        found.append(alike(meeting, typed))
        meeting.part()
    return found


def test_ranks_that_differ_are_refused_by_key_with_both_values(ranks: Ranks) -> None:
    first, second = ranks.run(compares, world_size=2, with_group=False)
    assert first == second
    for (*_, phrase), said in zip(DIFFER, first, strict=False):
        assert said.startswith("the ranks were not started alike: ") and phrase in said, said
    many, code, library, device, config = first[len(DIFFER) :]
    assert many.count(" on rank 0 and ") == agree.MAX_DIFFERENCES and "; and " in many
    assert "the text of train/loop.py is " in code and " and 0 on rank 1" in code
    assert f"the version of torch is {metadata.version('torch')} on rank 0 and 9.9 on rank 1" in library
    assert device == "the ranks do not compute alike: the device of run.device is cpu on rank 0 and cuda on rank 1"
    assert config.run.name.startswith("rank0-") and config.run.dir == f"runs/{config.run.name}"


def looks_at_folders(place: Path, apart: Path) -> list[Any]:
    """In `place` both ranks work in one folder, in `apart` each in its own."""
    rank, found, home = int(os.environ["RANK"]), list[Any](), Path.cwd()

    def made(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "entered").touch()

    def enter(key: str, folder: Path) -> list[str]:
        with agree.shared(meeting, key, folder, lambda _: made(folder) if rank == 0 else None):
            return sorted(path.name for path in folder.iterdir())

    def refuses(_: object) -> None:
        if rank == 1:
            raise ValueError("a log cannot be written here")
        (place / "odd").mkdir()

    def tokens(folder: Path) -> Any:
        config = compose.compose([*SMALL, f"data.dir={folder}"])
        return agree.same_tokens(meeting, config.data)

    def entered() -> None:
        with agree.shared(meeting, "run.dir", place / "odd", refuses):
            raise AssertionError("nobody enters")

    with mock.patch.object(agree, "_SEEN_WITHIN_S", 0.1), meet(rank, 2, STOP_S, print, end_hung=print) as meeting:
        meeting.come()
        try:
            found.append(enter("run.dir", place / "run"))
            found.append(refusal(entered))
            os.chdir(apart / str(rank))
            for key in ("run.dir", "checkpoint.dir"):
                found.append(refusal(lambda key=key: enter(key, Path(key))))  # type: ignore[misc]
            found.append([path.name for path in Path.cwd().iterdir() if path.suffix == ".dir"])
            found.append(tokens(place / "tokens"))
            found.append(tokens(Path("same")))
            found.append(refusal(lambda: tokens(Path("other"))))
            found.append(refusal(lambda: tokens(Path("absent"))))
        finally:
            os.chdir(home)
        meeting.part()
    return found


def test_folders_and_tokens_that_ranks_do_not_share(ranks: Ranks, tmp_path: Path) -> None:
    place, apart = tmp_path / "place", tmp_path / "apart"
    for folder in ("place/tokens", "apart/0/same", "apart/1/same", "apart/0/absent", "apart/0/other"):
        prepare_text(tmp_path / folder)
    (apart / "1" / "library" / "more.py").write_text("x = 1\n" * 500)
    prepare_text(apart / "1" / "other")
    first, second = ranks.run(looks_at_folders, place, apart, world_size=2, with_group=False)
    assert first[0] == second[0] == ["entered"], "the file that is looked for is gone when all have seen it"
    assert first[1] == second[1] == "a log cannot be written here"
    for key, said in (("run.dir", first[2]), ("checkpoint.dir", first[3])):
        assert said.startswith(f"{key}={key} is not shared: rank 1 (host ")
        assert f"does not see in {apart / '1' / key} what rank 0 (host " in said
    assert first[2:4] == second[2:4]
    assert sorted(first[4]) == ["checkpoint.dir", "run.dir"] and second[4] == [], "and leaves no folder of its own"
    assert first[5:7] == second[5:7] == [None, None], "tokens of other disks are the same where they are the same"
    assert first[7] == second[7] and first[7].startswith("the ranks do not read the same tokens: the tokens of ")
    assert " on rank 0 and " in first[7] and first[7].endswith(" on rank 1")
    assert first[8] == second[8] and first[8].startswith(f"data.dir={apart / '1' / 'absent'} is not shared: on rank 1")
