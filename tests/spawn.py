"""Long-lived gloo ranks for tests: starting Python and torch takes seconds, calling a function does not.

Processes are forked from one that has everything imported. `Ranks` keeps them alive for the whole test session. Each
`run` gives the first `world_size` of them a fresh default process group, calls one top-level function on every rank and
returns what each rank returned.
"""

from __future__ import annotations

import datetime
import multiprocessing as mp
import multiprocessing.connection
import os
import time
import traceback
from collections.abc import Callable
from typing import Any

from launch.ranks import HeldPort

# Nothing takes so long, however busy the machine is: past this it hangs.
STOP_S = 600.0


def imported() -> Any:
    """The context of processes that are forked from one that has imported what a rank imports. It starts with the first
    of them."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["train.rank", "torch._dynamo", "deepspeed"])
    return context


def _serve(rank: int, pipe: multiprocessing.connection.Connection) -> None:
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", WANDB_MODE="offline", WANDB_SILENT="true")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            message = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        if message is None:
            return
        fn, args, kwargs, world_size, port, timeout_s, with_group = message
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        try:
            if with_group:
                dist.init_process_group(
                    "gloo",
                    init_method=f"tcp://127.0.0.1:{port}",
                    rank=rank,
                    world_size=world_size,
                    timeout=datetime.timedelta(seconds=timeout_s),
                )
            reply = (True, fn(*args, **kwargs))
        except BaseException:
            reply = (False, traceback.format_exc())
        if dist.is_initialized():
            dist.destroy_process_group()
        pipe.send(reply)


class RankError(AssertionError):
    """A function failed on at least one rank; the message holds each failing rank's traceback."""


class Ranks:
    """A pool of worker processes, grown on demand and restarted after a failure or a timeout."""

    def __init__(self) -> None:
        self._context = imported()
        self._workers: list[tuple[Any, multiprocessing.connection.Connection]] = []

    def _grow(self, world_size: int) -> None:
        while len(self._workers) < world_size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(len(self._workers), theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        world_size: int = 4,
        timeout_s: float = STOP_S,
        with_group: bool = True,
        **kwargs: Any,
    ) -> list[Any]:
        """Call `fn(*args, **kwargs)` on ranks 0..world_size-1.

        With `with_group=False` only the environment of `torchrun` is set and `fn` makes its own process group.
        Raises RankError with the tracebacks of the ranks that failed or a list of those that never answered.
        """
        self._grow(world_size)
        pipes = [pipe for _, pipe in self._workers[:world_size]]
        with HeldPort() as port:
            for pipe in pipes:
                pipe.send((fn, args, kwargs, world_size, port, timeout_s, with_group))
            replies = self._replies(pipes, timeout_s)
        failures = {rank: text for rank, (ok, text) in replies.items() if not ok}
        missing = [rank for rank in range(world_size) if rank not in replies]
        if failures or missing:
            self.close()
            texts = [f"--- rank {rank}\n{text}" for rank, text in sorted(failures.items())]
            raise RankError("\n".join([*texts, f"ranks without an answer: {missing}" if missing else ""]))
        return [replies[rank][1] for rank in range(world_size)]

    @staticmethod
    def _replies(pipes: list[multiprocessing.connection.Connection], timeout_s: float) -> dict[int, tuple[bool, Any]]:
        """Whether each rank was well, and what it returned or its traceback; ranks that never answer are missing."""
        replies: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout_s
        while len(replies) < len(pipes) and time.monotonic() < deadline:
            waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in replies]
            for ready in multiprocessing.connection.wait(waiting, timeout=1):
                rank = pipes.index(ready)  # type: ignore[arg-type]
                try:
                    replies[rank] = ready.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    replies[rank] = (False, f"the process of rank {rank} died\n")
            # A rank that failed leaves the others waiting in a collective: do not wait for all of them.
            if any(not ok for ok, _ in replies.values()):
                deadline = min(deadline, time.monotonic() + 5)
        return replies

    def close(self) -> None:
        """End all workers; the next `run` starts new ones."""
        for process, pipe in self._workers:
            process.kill()
            pipe.close()
        for process, _ in self._workers:
            process.join()
        self._workers = []
