"""Tokenising on several processes: results come back in the order of the tasks, whatever the workers do.

A worker is `python -m train.data.prepare.workers`, fed through its standard input and read from its standard output.
Unlike a pool of `multiprocessing` it neither forks a process that has threads, nor imports the caller's main module
(torch, for a second and more) into each worker, nor outlives a killed parent: the end of its input ends it.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO

from train.data.prepare.encode import Encoded, Task, encode


class _Worker:
    """One process that encodes one task at a time."""

    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parents[2])  # so that it finds this package, installed or not
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )

    def encode(self, task: Task) -> Encoded:
        """ChildProcessError when the process has died."""
        assert self._process.stdin is not None and self._process.stdout is not None, "both are pipes"
        try:
            pickle.dump(task, self._process.stdin)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise ChildProcessError(
                f"a tokenising worker died (exit code {self._process.wait()}; killed from outside, or out of memory): "
                "run it again, with a smaller data.num_workers if memory is short"
            ) from None

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def encode_in_order(tasks: Iterable[Task], num_workers: int) -> Iterator[Encoded]:
    """Encode tasks on `num_workers` processes (one: in this process), results in the order of the tasks.

    Tasks are taken as workers become free, so neither they nor results pile up. ChildProcessError when a worker dies.
    """
    if num_workers == 1:
        yield from map(encode, tasks)
        return
    workers = [_Worker() for _ in range(num_workers)]
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def run(task: Task) -> Encoded:
        worker = idle.get()
        try:
            return worker.encode(task)
        finally:
            idle.put(worker)

    waiting: deque[Future[Encoded]] = deque()
    pool = ThreadPoolExecutor(num_workers)
    try:
        for task in tasks:
            waiting.append(pool.submit(run, task))
            if len(waiting) >= 3 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for worker in workers:
            worker.close()
        pool.shutdown(cancel_futures=True)


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer tasks until the input ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the parent's to handle, whose end closes the input
    while True:
        try:
            task = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(encode(task), replies)
        replies.flush()


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
