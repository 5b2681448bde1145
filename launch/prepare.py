"""`python -m launch prepare`: prepare the tokens of a configuration, report what they hold and what a run will see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from train import compose
from train.config import RunConfig
from train.data.config import DataConfig
from train.data.meta import Meta
from train.data.prepare.all_sources import prepare_sources
from train.data.read.trouble import BAD, REASONS
from train.data.rows.blend import check_epochs, exposure_table, open_stream

# So many endings of files are named of each form.
_NUM_ENDINGS = 4


def prepare(settings: Sequence[str]) -> int:
    """`python -m launch prepare`: prepare what the run of these settings reads, and say what it will see."""

    def start(config: RunConfig) -> int:
        prepare_run(config, histogram=True)
        return 0

    return compose.started(settings, start)


def prepare_run(config: RunConfig, histogram: bool = False) -> None:
    """Prepare what a run reads and print what it will see of it. ValueError where `data.max_epochs` forbids the run.

    histogram: whether to draw the documents' lengths, too.
    """
    prepare_command(config.data, histogram)
    try:
        rows = open_stream(config.data, "train", config.train.seq_len, config.train.seed)
    except ValueError as error:  # prepared all the same, for a run with shorter sequences
        print(f"This run cannot read it: {error}", flush=True)
        return
    print(f"The run reads {config.num_sequences:,} sequences of {config.train.seq_len} tokens:", flush=True)
    print(exposure_table(rows, config.num_sequences), flush=True)
    check_epochs(rows, config.num_sequences, config.data.max_epochs)


def check_epochs_of(config: RunConfig) -> None:
    """ValueError where `data.max_epochs` forbids a run whose data are prepared."""
    rows = open_stream(config.data, "train", config.train.seq_len, config.train.seed)
    check_epochs(rows, config.num_sequences, config.data.max_epochs)


def prepare_command(config: DataConfig, histogram: bool = False) -> None:
    """Prepare the data of `config` unless it is there, and print what it holds. ValueError as `prepare` raises it."""
    for name, meta in prepare_sources(config, say=lambda line: print(line, flush=True)).items():
        if config.blend:
            print(f"\n{name}", flush=True)
        print(report(meta, histogram), flush=True)
    print(f"The tokens lie in {config.folder}.", flush=True)


def report(meta: Meta, histogram: bool = False) -> str:
    """What a folder of prepared tokens holds: a table of its splits, and a sentence for all that was passed over."""
    lines = [f"{'split':<8}{'documents':>12}{'MB':>10}{'tokens':>16}{'bytes/token':>13}{'unigram nats':>14}"]
    for name, split in meta.splits.items():
        if split.unigram_entropy_nats is None:
            lines.append(f"{name:<8}{0:>12}")
            continue
        lines.append(
            f"{name:<8}{split.num_documents:>12,}{split.num_bytes / 1e6:>10.2f}{split.num_tokens:>16,}"
            f"{split.num_bytes / split.num_tokens:>13.2f}{split.unigram_entropy_nats:>14.4f}"
        )
    lines += list(meta.notes)
    lines += _of_the_source(meta, histogram)
    for reason, skipped in meta.skipped.items():
        if skipped.count:
            what = REASONS[reason]
            if reason in BAD:
                what += ", passed over"
            elif reason == "duplicate":
                what += ", left out" if meta.settings["deduplicate"] else ", kept (data.deduplicate=true leaves it out)"
            more = ", ..." if skipped.count > 3 else ""
            lines.append(f"{what}: {skipped.count:,}, {', '.join(skipped.examples[:3])}{more}")
    return "\n".join(lines)


def _read_as(forms: Mapping[str, Mapping[str, int]]) -> list[str]:
    """What the files were read as, with the most frequent endings of their names. Folders of before have no word of it.

    Those endings are the ones to look at: a file's contents decide, and may be something else than they say.
    """
    said = []
    for form, endings in forms.items():
        often = sorted(endings, key=lambda ending: (-endings[ending], ending))
        named = ", ".join(f"{endings[ending]:,} {ending or 'without an ending'}" for ending in often[:_NUM_ENDINGS])
        more = f" and {len(often) - _NUM_ENDINGS} other endings" if len(often) > _NUM_ENDINGS else ""
        said.append(f"{form}: {named}{more}")
    return [f"read as {'; '.join(said)}"] if said else []


def _of_the_source(meta: Meta, histogram: bool) -> list[str]:
    """Its counts and its documents' lengths; with `histogram` a bar for each power of two."""
    report = meta.report
    lengths = report["document_tokens"]
    shares = ", ".join(f"{lengths[f'p{share}']:,} ({share} %)" for share in (5, 25, 50, 75, 95))
    lines = [
        f"source: {report['files']:,} files, {report['documents']:,} documents, {report['bytes'] / 1e6:.2f} MB, "
        f"{report['tokens']:,} tokens, {report['bytes_per_token']:.2f} bytes/token",
        *_read_as(report.get("read_as", {})),
        f"tokens of a document: {lengths['least']:,} to {lengths['most']:,}, mean {lengths['mean']:.1f}; "
        f"no more than {shares}",
    ]
    if not histogram:
        return lines
    most = max(lengths["histogram"].values())
    for least, count in lengths["histogram"].items():
        lines.append(f"{int(least):>10,} and more {'#' * max(1, round(40 * count / most))} {count:,}")
    return lines
