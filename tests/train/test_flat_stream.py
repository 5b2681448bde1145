"""Ranges of a checkpoint read one at a time, against the whole tensors; ranges written, against the usual reader."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.runs import read_checkpoint
from tests.train.checkpoint_cases import cuts, open_checkpoints, save_case, truth
from train.checkpoint import step_folders
from train.checkpoint.reader import RangeReader, read_metadata
from train.checkpoint.writer import write_ranges
from train.files import check_contents


@pytest.mark.parametrize("case", range(8))
def test_any_range_of_what_a_run_saved(tmp_path: Path, case: int) -> None:
    checkpoints = open_checkpoints(tmp_path)
    save_case(checkpoints, case, step=1)
    checkpoints.wait()
    draw, tensors = random.Random(case), truth(case)
    with RangeReader(tmp_path / "step-00000001") as reader:
        known = {name: saved.numel for name, saved in reader.tensors.items()}
        assert known == {name: tensor.numel() for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            for _ in range(20):
                first = draw.randrange(tensor.numel())
                count = draw.randint(0, tensor.numel() - first)
                found = reader.read(name, first, count)
                assert found.dtype == tensor.dtype
                assert torch.equal(found, tensor[first : first + count])


@pytest.mark.parametrize("case", range(8))
def test_what_is_written_in_ranges_loads(tmp_path: Path, case: int) -> None:
    draw = random.Random(case)
    tensors = {name: tensor.float() for name, tensor in truth(case).items()}
    ranges = [(name, first, end) for name, tensor in tensors.items() for first, end in cuts(draw, tensor.numel())]
    draw.shuffle(ranges)
    folder = tmp_path / "step-00000000"
    folder.mkdir()
    parts = ((name, first, tensors[name][first:end]) for name, first, end in ranges)
    records = write_ranges(folder, {name: tensor.numel() for name, tensor in tensors.items()}, parts)
    check_contents(folder, records)
    step_folders.write_manifest(folder, records)
    found = read_checkpoint(folder)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    with RangeReader(folder) as reader:
        assert all(torch.equal(reader.read(name, 0, tensor.numel()), tensor) for name, tensor in tensors.items())


def test_gaps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a: elements 2 to 3 are not saved"):
        write_ranges(tmp_path, {"a": 4}, [("a", 0, torch.zeros(2))])
    with pytest.raises(ValueError, match="a: elements 1 to 1 are not saved once"):
        write_ranges(tmp_path, {"a": 3}, [("a", 0, torch.zeros(2)), ("a", 1, torch.zeros(2))])


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    values = torch.arange(1000.0)
    write_ranges(tmp_path, {"a": 1000}, [("a", 0, values)])
    file = tmp_path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:2000])
    read_metadata(tmp_path)
    with RangeReader(tmp_path) as reader, pytest.raises(ValueError, match=r"__0_0\.distcp"):
        reader.read("a", 0, 1000)
