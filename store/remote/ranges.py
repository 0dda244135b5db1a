"""Some columns of a shard that is elsewhere, without the bytes of the others.

An Arrow file's footer says where its record batch is, and the batch's header where each buffer is; Arrow reads the
buffers of the columns asked for, and no others. It is asked twice: once to see which bytes it wants, without fetching
them, and once with them there, so that what lies close together comes in one request.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import pyarrow as pa

from ..errors import StoreCorrupt, StoreMismatch
from .elsewhere import Place
from .transfer import CHUNK, Advance, nothing

GAP = 64 << 10  # bytes of other columns that are fetched rather than asked around
SHARE = 0.5  # of a shard: more than that is fetched whole, with its checksum
_TAIL = 16 << 10  # bytes; most footers are shorter
Span = tuple[int, int]


class ColumnReader:
    """Columns of one remote shard of `size` bytes. Raises StoreCorrupt where it is not an Arrow file of that size."""

    def __init__(self, place: Place, name: str, size: int, columns: Sequence[str], advance: Advance = nothing):
        self._place, self._name, self._size, self._columns, self._advance = place, name, size, columns, advance
        found = place.stat(name)
        if found is None or found.size != size:
            raise StoreCorrupt(f"{place.url}/{name}: {size} bytes by the manifest; got {found and found.size}")
        self._tag = found.tag
        self._known: dict[Span, bytes] = {}
        self._wanted = self._ask()

    @property
    def cost(self) -> int:
        """Bytes that are still to be fetched."""
        return sum(stop - start for start, stop in self._wanted)

    def read(self) -> pa.RecordBatch:
        """Raises StoreMismatch where the file changed meanwhile."""
        for start, stop in self._wanted:
            self._fetch(start, stop)
        found = self._place.stat(self._name)
        if found is None or (found.size, found.tag) != (self._size, self._tag):
            raise StoreMismatch(f"{self._place.url}/{self._name} changed while it was read; read the store anew")
        return self._parse(_Spans(self._size, self._known))

    def _ask(self) -> list[Span]:
        """What Arrow wants beyond footer and header, merged where little lies between."""
        self._fetch(max(0, self._size - _TAIL), self._size)
        asking = _Spans(self._size, self._known, self._fetch)
        self._parse(asking)
        merged: list[Span] = []
        for start, stop in sorted(asking.missing):
            if merged and start - merged[-1][1] <= GAP:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        return merged

    def _fetch(self, start: int, stop: int) -> None:
        pieces = [self._place.read(self._name, at, min(at + CHUNK, stop)) for at in range(start, stop, CHUNK)]
        data = b"".join(pieces)
        if len(data) != stop - start:
            raise StoreMismatch(f"{self._place.url}/{self._name} ended at byte {start + len(data)} of {self._size}")
        self._known[start, stop] = data
        self._advance(len(data))

    def _parse(self, file: _Spans) -> pa.RecordBatch:
        where = f"{self._place.url}/{self._name}"
        try:
            source = pa.PythonFile(file, mode="r")
            described = pa.ipc.open_file(source)
            names = described.schema.names
            if missing := [name for name in self._columns if names.count(name) != 1]:
                raise StoreCorrupt(f"{where}: no one column {missing[0]!r}")
            if described.num_record_batches != 1:
                raise StoreCorrupt(f"{where}: one record batch expected; got {described.num_record_batches}")
            options = pa.ipc.IpcReadOptions(included_fields=[names.index(name) for name in self._columns])
            reader = pa.ipc.open_file(source, options=options)
            file.header = True
            return reader.get_batch(0)
        except (pa.ArrowException, OSError, MemoryError, OverflowError) as error:
            detail = str(error).split("\n")[0][:200]
            raise StoreCorrupt(f"{where} is not a readable shard ({detail})") from error


class _Spans(io.RawIOBase):
    """A file of which some spans are known. With `fetch`, others are fetched, up to the header of the batch, which is
    the first read after `header` was set; of the body, what is not known is zeros, and noted in `missing`."""

    def __init__(self, size: int, known: dict[Span, bytes], fetch: Callable[[int, int], None] | None = None):
        self._size, self._known, self._fetch, self._at = size, known, fetch, 0
        self.missing: list[Span] = []
        self.header = self._in_body = False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def size(self) -> int:
        return self._size

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, count: int = -1) -> bytes:
        start = self._at
        stop = self._size if count < 0 else min(start + count, self._size)
        self._at = max(start, stop)
        if stop <= start:
            return b""
        if self._find(start, stop) is None and self._fetch is not None:
            if self._in_body:
                self.missing.append((start, stop))
                return bytes(stop - start)
            self._fetch(start, stop)
        self._in_body = self._in_body or self.header
        data = self._find(start, stop)
        if data is None:
            raise OSError(f"bytes {start} to {stop} were not asked for before")
        return data

    def _find(self, start: int, stop: int) -> bytes | None:
        for (begin, end), data in self._known.items():
            if begin <= start and stop <= end:
                return data[start - begin : stop - begin]
        return None
