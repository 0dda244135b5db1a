"""Teacher outputs that others already have become a store: read once to check them all, and again to write them.

What is known of their origin is said, and `unknown` stands for the rest.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..store import (
    ConfigError,
    DataError,
    FieldSpec,
    Plan,
    ShardPlan,
    StoreWriter,
    bytes_per_row,
    describe,
    manifest,
    tokenizer_sha256,
)
from ..store.writer import check_folder
from .disk import check_room
from .importing.columns import Survey, fields, fill, lengths
from .importing.config import LOGITS, UNKNOWN, ImportConfig
from .importing.files import Sources, find
from .importing.formats import Format, Reader
from .importing.numbers import Unfit
from .importing.rows import Kept, kept
from .progress import RowProgress, say

_INDEX_BYTES = 150  # a row of index.duckdb and samples.parquet
_TOLD = 5  # rows that do not fit, named in one refusal


def import_outputs(config: ImportConfig) -> dict[str, Any]:
    """Make a store of causal-lm rows in `config.output_dir`; the same call again continues it.

    Returns what `describe` says of it. Raises ConfigError; DataError naming the rows that do not fit,
    before anything is written; StoreMismatch, StoreError, OutOfSpace as a dump does.
    """
    folder = Path(config.output_dir).expanduser()
    check_folder(folder)
    sources, tokenizer = find(config.source), _tokenizer(config)
    made = Format(config, sources, tokenizer)
    found = _survey(sources, made.reader)
    plan = _plan(config, sources, made, found, tokenizer)
    for line in _notices(made, found, tokenizer):
        say(f"note: {line}")
    check_room(folder, round(found.total * (_row_bytes(plan.fields, found) + _INDEX_BYTES)))
    with StoreWriter.begin(folder, plan, config.overwrite) as writer:
        missing = writer.missing()
        if missing or not (folder / manifest.MANIFEST).exists():
            _write(sources, made.reader, writer, missing)
            _finish(writer, tokenizer)
    return describe(folder)


def _survey(sources: Sources, reader: Reader) -> Survey:
    """Every row once. Raises DataError naming those that do not fit."""
    found, wrong, first = Survey(), 0, ""
    named: list[str] = []
    with RowProgress("rows checked") as progress:
        for split in sources.splits:
            for number, row in enumerate(sources.read(split, reader.columns)):
                try:
                    found.add(split, _kept(reader, row))
                except Unfit as error:
                    wrong, first = wrong + 1, first or str(error)
                    named += [f"split {split}, row {number}"] if len(named) < _TOLD else []
                progress.passed()
            if split not in found.rows and not wrong:
                raise DataError(f"split {split}: a row expected; its files have none")
    if wrong:
        others = f" ({wrong} rows do not fit; also {'; '.join(named[1:])}{'; …' if wrong > len(named) else ''})"
        raise DataError(f"{named[0]}: {first}{others if wrong > 1 else ''}")
    return found


def _kept(reader: Reader, row: dict[str, Any]) -> Kept:
    return kept(reader.read(row), reader.rules)


def _tokenizer(config: ImportConfig) -> Any:
    if config.tokenizer is None:
        return None
    from transformers import AutoTokenizer

    from .teachers.teacher import quiet_transformers

    folder = Path(config.tokenizer).expanduser()
    try:
        with quiet_transformers():
            where = str(folder) if folder.is_dir() else config.tokenizer
            return AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and the Hub raise many kinds
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"--tokenizer {config.tokenizer} cannot be loaded: {reason}") from error


def _plan(config: ImportConfig, sources: Sources, made: Format, found: Survey, tokenizer: Any) -> Plan:
    pad = None if tokenizer is None else tokenizer.pad_token_id
    columns = fields(found, made.values, made.vocabulary, config.dtype, pad or 0)
    limit = max(1, int(config.shard_size / _row_bytes(columns, found)))
    shards = []
    for split, rows in found.rows.items():
        count = math.ceil(rows / limit)
        bounds = [rows * at // count for at in range(count + 1)]
        shards += [ShardPlan(split, at, bounds[at], bounds[at + 1]) for at in range(count)]
    settings = {
        "imported": True, **made.settings, "dtype": config.dtype, "splits": list(found.rows),
        "shard_size": config.shard_size,
    }  # fmt: skip
    return Plan("causal-lm", settings, _identity(config, sources, found, tokenizer), columns, shards)


def _row_bytes(columns: list[FieldSpec], found: Survey) -> float:
    return bytes_per_row(columns, found.lengths)


def _identity(config: ImportConfig, sources: Sources, found: Survey, tokenizer: Any) -> dict[str, Any]:
    """Names are what was said; hashes, of what there is to hash."""
    own = importlib.import_module(__name__.split(".")[0]).__version__  # installed or not
    named = {"name": Path(config.tokenizer).name if config.tokenizer else UNKNOWN}
    return {
        "teacher": {
            "name": config.teacher or UNKNOWN, "class": UNKNOWN, "weights_sha256": UNKNOWN, "config_sha256": UNKNOWN,
        },
        "tokenizer": {**named, "sha256": tokenizer_sha256(tokenizer) if tokenizer is not None else UNKNOWN},
        "dataset": {"name": sources.name, "revision": None, "rows": found.total, "rows_sha256": found.sha256},
        "versions": {"predistill": own, "pyarrow": importlib.metadata.version("pyarrow")},
    }  # fmt: skip


def _notices(made: Format, found: Survey, tokenizer: Any) -> Iterator[str]:
    sizes = f"{found.most}" if found.least == found.most else f"{found.least} to {found.most}"
    known = found.positions / found.tokens
    yield (
        f"{made.name}: {found.total} rows, {found.tokens} tokens, {known:.1%} of them with {sizes} {made.values}; what "
        "stands at a token speaks of the next"
    )
    if made.values == LOGITS:
        yield "what logits that are not there weigh is not known: the kept ones are taken for all"
    if tokenizer is None:
        yield "the tokenizer stays unknown (--tokenizer names it), so students are not held against it"


def _write(sources: Sources, reader: Reader, writer: StoreWriter, missing: list[ShardPlan]) -> None:
    """Shards one after another; rows of those that are committed are passed over."""
    place = ("", 0)
    rows: Iterator[dict[str, Any]] = iter(())
    with RowProgress("rows written", sum(shard.stop - shard.start for shard in missing)) as progress:
        for shard in missing:
            if place != (shard.split, shard.start):
                rows = sources.read(shard.split, reader.columns, shard.start)
            piece = []
            for _ in range(shard.stop - shard.start):
                piece.append(_again(reader, next(rows, None), shard))
                progress.passed()
            place = (shard.split, shard.stop)
            builder = writer.open_shard(shard, len(piece), lengths(piece))
            fill(builder, piece)
            sources.check_unchanged()
            writer.commit(builder)


def _again(reader: Reader, row: dict[str, Any] | None, shard: ShardPlan) -> Kept:
    """A row that was checked before. Raises DataError where it is another by now."""
    try:
        if row is not None:
            return _kept(reader, row)
    except Unfit:
        pass
    raise DataError(f"split {shard.split} changed while it was read: let it be, and import it again with --overwrite")


def _finish(writer: StoreWriter, tokenizer: Any) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folders = {}
        if tokenizer is not None:
            tokenizer.save_pretrained(Path(scratch) / "tokenizer")
            folders["tokenizer"] = Path(scratch) / "tokenizer"
        writer.finish(folders)
