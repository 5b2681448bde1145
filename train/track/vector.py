"""A rank's metrics of a step as one vector, and the vectors of all ranks as the step's metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from train.track.metrics import Metric, Reduction, Sample, StepReport

Rows = Sequence[Sequence[float]]  # the vector of every rank, in rank order


class Metrics:
    """The metrics of one run in the order of its reports. Their names may be made when the run is put together.

    The vector holds a number for each metric that travels, and behind those as many flags: 1 where this rank has
    measured it. All ranks lay it out alike, whatever each of them measures in a step.
    """

    def __init__(self, declared: Iterable[Metric]) -> None:
        """ValueError when a name is declared twice."""
        self._declared: dict[str, Metric] = {}
        self._travelling: dict[str, Reduction] = {}
        for metric in declared:
            if metric.name in self._declared:
                raise ValueError(f"the metric {metric.name} is declared twice")
            self._declared[metric.name] = metric
            if metric.over is not None:
                self._travelling[metric.name] = metric.over
        self._place = {name: number for number, name in enumerate(self._travelling)}

    def add(self, total: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
        """Take what another micro-batch has measured into the total of a rank."""
        for name, value in more.items():
            total[name] = self._travelling[name].micro_batches(total[name], value) if name in total else value

    def pack(self, measured: Mapping[str, Tensor | float], put: Callable[[Tensor], Tensor]) -> Tensor:
        """float64 [2 x metrics that travel], on the device; the host waits for nothing.

        measured: scalars of the device, and numbers of the host. put: brings a tensor of the host to the device.
        KeyError for a metric that is not declared, or that does not travel.
        """
        if undeclared := measured.keys() - self._travelling.keys():
            raise KeyError(f"no metric that travels: {', '.join(sorted(undeclared))}")
        numbers = [measured.get(name, 0.0) for name in self._travelling]
        from_host = [0.0 if isinstance(number, Tensor) else float(number) for number in numbers]
        flags = [float(name in measured) for name in self._travelling]
        landed = put(torch.tensor([*from_host, *flags], dtype=torch.float64))
        own = [number.double() if isinstance(number, Tensor) else landed[place] for place, number in enumerate(numbers)]
        return torch.cat([torch.stack(own), landed[len(own) :]])

    def column(self, rows: Rows, name: str) -> list[float]:
        """One metric of every rank that has measured it, in rank order."""
        place = self._place[name]
        return [row[place] for row in rows if row[place + len(self._place)]]

    def unpack(self, rows: Rows, counts: Mapping[str, int]) -> dict[str, float]:
        """The metrics of all ranks together, by name, without those that no rank has measured.

        counts: what metrics are divided by that is no metric itself. One that is 0 divides by 1.
        """
        totals: dict[str, float] = {}
        for name, reduction in self._travelling.items():
            column = self.column(rows, name)
            if column and reduction.ranks is not None:
                totals[name] = reduction.ranks(column)
        return {name: self._finished(self._declared[name], totals, counts) for name in totals}

    @staticmethod
    def _finished(metric: Metric, totals: Mapping[str, float], counts: Mapping[str, int]) -> float:
        value = totals[metric.name]
        if metric.per is not None:
            value /= (totals[metric.per] if metric.per in totals else counts[metric.per]) or 1
        return int(value) if metric.is_whole else value

    def finite(self, values: Mapping[str, float]) -> bool:
        """Whether all losses among them are numbers."""
        return all(math.isfinite(value) for name, value in values.items() if self._declared[name].is_loss)

    def losses(self, measured: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The losses among what a micro-batch has measured."""
        return {name: value for name, value in measured.items() if self._declared[name].is_loss}

    def report(
        self, values: Mapping[str, float], loads: list[list[int]] | None = None, samples: Sequence[Sample] = ()
    ) -> StepReport:
        """The step's report, in the declared order. KeyError for a metric that is not declared."""
        if undeclared := values.keys() - self._declared.keys():
            raise KeyError(f"no declared metric: {', '.join(sorted(undeclared))}")
        reported = (name for name, metric in self._declared.items() if metric.is_reported and name in values)
        return StepReport({name: values[name] for name in reported}, loads, list(samples))
