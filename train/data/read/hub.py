"""The one door to the `datasets` library: data sets on this machine or, where there is a network, by their names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.data.config import DataConfig
from train.data.read.blocks import BLOCK_BYTES, ROWS, Block, DamagedError, Position, Trouble

if TYPE_CHECKING:
    import datasets

# What `save_to_disk` leaves in the folder of a data set, and in that of a dictionary of data sets.
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
_MAX_ROWS = 1 << 12


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` has written this folder."""
    whole = (path / _SAVED).is_file() and (path / "dataset_info.json").is_file()
    return whole or (path / _SAVED_SPLITS).is_file()


class DatasetRows:
    """The text column of one split, memory-mapped by the library."""

    def __init__(self, name: str, dataset: datasets.Dataset, text_field: str) -> None:
        self.name = name
        self.fingerprint = str(dataset._fingerprint)
        self.num_bytes = int(dataset.data.nbytes)
        self._num_rows = len(dataset)
        self._column = dataset.select_columns([text_field]).with_format("arrow")

    def blocks(self, at: Position) -> Iterator[Block]:
        """The rows from `at` on, about a megabyte a block."""
        from train.data.read.tables import column_bytes

        per_row = self.num_bytes / max(1, self._num_rows)
        count = max(1, min(_MAX_ROWS, int(BLOCK_BYTES / max(1.0, per_row))))
        while at.place < self._num_rows:
            stop = min(at.place + count, self._num_rows)
            behind = Position(at.file, stop)
            values: tuple[bytes | None, ...] = ()
            troubles: tuple[Trouble, ...] = ()
            try:
                values = column_bytes(self._column[at.place : stop].column(0))
            except Exception as error:  # the library raises what its many parts raise
                why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                troubles = (Trouble("corrupt", at.file, f"rows {at.place} to {stop - 1}", why),)
            yield Block(ROWS, values, at, behind, int((stop - at.place) * per_row), troubles)
            at = behind
        notes = () if self._num_rows else (Trouble("empty", at.file, "", "no rows"),)
        yield Block(ROWS, (), at, Position(at.file + 1), 0, notes)


def load(name: str, config: DataConfig) -> DatasetRows:
    """The split `data.dataset_split` of a saved data set, a local folder, a builder with files, or a name of the hub.

    Raises ValueError when it cannot be loaded, has no such split, or its text column is none.
    """
    said = f"data.source={config.source}"
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{said} needs the package datasets: {error}") from None
    from train.data.read.tables import check_column

    try:
        found = _load(datasets, name, config)
        if isinstance(found, datasets.DatasetDict):
            if config.dataset_split not in found:
                raise ValueError(f"its splits are {', '.join(map(str, found))}")
            found = found[config.dataset_split]
    except Exception as error:  # the library raises what its many parts raise
        raise ValueError(
            f"{said} cannot be loaded with data.dataset_split={config.dataset_split}: {_why(error)}"
        ) from None
    try:
        check_column(found.features.arrow_schema, config.text_field)
    except DamagedError as error:
        raise ValueError(f"{said} has no text in data.text_field={config.text_field}: {error.detail}") from None
    return DatasetRows(f"{name}, {config.dataset_split}", found, config.text_field)


def _load(datasets: Any, name: str, config: DataConfig) -> Any:
    if is_saved(Path(name)):
        return datasets.load_from_disk(name)
    bars = datasets.utils.are_progress_bars_disabled()
    datasets.utils.disable_progress_bars()
    try:
        files = list(config.dataset_files) or None
        path = os.path.abspath(name) if os.path.exists(name) else name
        return datasets.load_dataset(path, config.dataset_name, data_files=files, split=config.dataset_split)
    finally:
        if not bars:
            datasets.utils.enable_progress_bars()


def _why(error: BaseException) -> str:
    """The library's words in one line, with those of the cause, which say more."""
    cause = error.__cause__
    words = [str(each) or type(each).__name__ for each in (error, cause) if each is not None]
    return "; ".join(word.splitlines()[0][:200] for word in words)
