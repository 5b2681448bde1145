"""A moving average of the weights in CPU memory, updated beside training (technical report, section 3.2.3).

Each rank averages the master weights it owns, so all ranks together hold every average once (or as often as the
masters). A thread of its own reads the masters while the next step's forward and backward run; `wait` stands before
everything that changes masters or reads averages.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from train.checkpoint.ranges import HostRange, Pieces

PREFIX, MASTER = "ema.", "master."
# Elements at a time: fewer than torch spreads over several threads, which would take cores from the training itself.
_CHUNK = 1 << 15


class Ema:
    """ema = decay * ema + (1 - decay) * master after every optimizer step; it begins as the masters it is made with."""

    def __init__(self, masters: Pieces, decay: float) -> None:
        """masters: "master.NAME" to this rank's ranges, as `ZeroOptimizer.state` gives them; others are ignored."""
        self._weight = 1 - decay
        self._masters = {name: parts for name, parts in masters.items() if name.startswith(MASTER)}
        self._averages = {
            name: [HostRange(part.offset, part.tensor.detach().to("cpu", copy=True)) for part in parts]
            for name, parts in self._masters.items()
        }
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self) -> None:
        """Take in the masters as they are now, in the background. They must not change before `wait`."""
        self.wait()
        device = next((part.tensor.device for parts in self._masters.values() for part in parts), torch.device("cpu"))
        ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        self._thread = threading.Thread(target=self._run, args=(device, ready), name="ema")
        self._thread.start()

    def wait(self) -> None:
        """Until the averages are up to date. Raises what went wrong in the background."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def state(self) -> Pieces:
        """Averages as ranges of global tensors, "ema.NAME": views, of which writing loads them. Waits."""
        self.wait()
        return {PREFIX + name.removeprefix(MASTER): parts for name, parts in self._averages.items()}

    @staticmethod
    def sizes(master_sizes: Mapping[str, int]) -> dict[str, int]:
        """Elements of each average's global tensor, from those of all states, of which masters count."""
        return {
            PREFIX + name.removeprefix(MASTER): size for name, size in master_sizes.items() if name.startswith(MASTER)
        }

    def _run(self, device: torch.device, ready: torch.cuda.Event | None) -> None:
        try:
            if ready is None:
                self._update()
                return
            # Not behind the next step's kernels: a stream of its own, once the optimizer's are done.
            with torch.cuda.stream(torch.cuda.Stream(device)):
                torch.cuda.current_stream(device).wait_event(ready)
                self._update()
        except BaseException as error:
            self._error = error

    @torch.no_grad()
    def _update(self) -> None:
        for name, parts in self._masters.items():
            for master, average in zip(parts, self._averages[name], strict=True):
                values: Tensor = master.tensor if master.tensor.device.type == "cpu" else master.tensor.cpu()
                for piece, old in zip(values.split(_CHUNK), average.tensor.split(_CHUNK), strict=True):
                    old.lerp_(piece, self._weight)
