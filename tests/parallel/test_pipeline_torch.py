"""A bridge to torch: its own rank lists equal ours action for action, and it parses and validates our lists.

torch calls the input gradient I and the full backward B, writes the stage first, and knows one route only.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch.distributed.pipelining import schedules as theirs

from parallel.pipeline.actions import Action, Pair
from parallel.pipeline.registry import build
from parallel.pipeline.schedule import Schedule
from tests.parallel.pipeline_cases import legal_cases, make

KINDS = {"F": "F", "B": "I", "W": "W", "D": "B"}


def torch_text(action: Action) -> str:
    if isinstance(action, Pair):
        return f"({torch_text(action.forward)};{torch_text(action.backward)})OVERLAP_F_B"
    return f"{action.stage}{KINDS[action.kind]}{action.micro_batch}"


def torch_lists(kind: type, num_ranks: int, stages_per_rank: int, num_micro_batches: int) -> list[list[str]]:
    """What torch would run, without the processes and modules that its constructor demands."""
    schedule: Any = object.__new__(kind)
    schedule.pp_group_size = num_ranks
    schedule.n_local_stages = stages_per_rank
    schedule.num_stages = schedule._num_stages = num_ranks * stages_per_rank
    schedule._n_microbatches = num_micro_batches
    schedule.number_of_rounds = max(1, num_micro_batches // num_ranks)
    schedule.microbatches_per_round = num_micro_batches // schedule.number_of_rounds
    lists = [schedule._calculate_single_rank_operations(rank) for rank in range(num_ranks)]
    return [[str(action) for action in actions if action is not None] for actions in lists]


def ours(schedule: Schedule) -> list[list[str]]:
    return [[torch_text(action) for action in actions] for actions in schedule.ranks]


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5, 8, 16])
def test_torchs_lists_equal_ours(num_ranks: int) -> None:
    for num in (2 * num_ranks, 2 * num_ranks + 3, 4 * num_ranks):
        assert torch_lists(theirs.ScheduleDualPipeV, num_ranks, 2, num) == ours(build("dualpipev", num_ranks, num))
    for num in (1, num_ranks, 2 * num_ranks - 1, 3 * num_ranks + 1):
        assert torch_lists(theirs.ScheduleZBVZeroBubble, num_ranks, 2, num) == ours(build("zbv", num_ranks, num))
    for stages in (2, 3, 4):
        for num in (num_ranks, 2 * num_ranks, 5 * num_ranks):
            looped = build("interleaved_1f1b", num_ranks, num, stages_per_rank=stages)
            assert torch_lists(theirs.ScheduleInterleaved1F1B, num_ranks, stages, num) == ours(looped)


ONE_ROUTE = [case for case in legal_cases((1, 2, 3, 4), (2,)) if len(make(case).placement.routes) == 1]


@pytest.mark.parametrize("case", ONE_ROUTE, ids=str)
def test_torch_parses_validates_and_lowers_our_lists(case: tuple) -> None:
    schedule = make(case)
    placement = schedule.placement
    lists = {rank: [theirs._Action.from_str(word) for word in words] for rank, words in enumerate(ours(schedule))}
    found = theirs._validate_schedule(lists, placement.num_ranks, placement.num_stages, schedule.num_micro_batches[0])
    assert found == dict(enumerate(placement.rank_of))
    # Its lowering simulates the run to place sends and receives: it ends only if nothing waits for ever.
    lowered = theirs._add_send_recv(lists, lambda stage: placement.rank_of[stage], placement.num_stages)
    sends = sum(str(action.computation_type.value).startswith("SEND") for own in lowered.values() for action in own)
    crossing = sum(
        placement.rank_of[a] != placement.rank_of[b]
        for a, b in zip(placement.routes[0], placement.routes[0][1:], strict=False)
    )
    assert sends == 2 * crossing * schedule.num_micro_batches[0]
