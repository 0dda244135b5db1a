"""FORMAT.md is enough: a reader written from that page alone, with json, hashlib, numpy and pyarrow."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic_store as synthetic


def digest(value: Any) -> str:
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    ).hexdigest()


class StrangersReader:
    def __init__(self, folder: Path):
        self.store = json.loads((folder / "store.json").read_text())
        body = {key: value for key, value in self.store.items() if key != "sha256"}
        assert digest(body) == self.store["sha256"]
        nameless = json.loads(json.dumps(self.store["plan"]))
        for part in ("teacher", "tokenizer", "dataset"):
            nameless["identity"].get(part, {}).pop("name", None)
        assert digest(nameless) == self.store["fingerprint"]
        assert json.loads((folder / "plan.json").read_text()) == self.store["plan"]
        self.rows: list[dict[str, Any]] = []
        for entry, planned in zip(self.store["shards"], self.store["plan"]["shards"], strict=True):
            self._read(folder / "shards" / f"{entry['name']}.arrow", entry, planned)

    def _read(self, path: Path, entry: dict[str, Any], planned: dict[str, Any]) -> None:
        assert entry["name"] == f"{planned['split']}-{planned['number']:05d}"
        data = path.read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (entry["sha256"], entry["bytes"])
        reader = pa.ipc.open_file(data)
        assert reader.num_record_batches == 1
        batch, said = reader.get_batch(0), reader.schema.metadata
        assert said[b"predistill.format_version"] == b"1"
        assert said[b"predistill.fingerprint"].decode() == self.store["fingerprint"]
        assert json.loads(said[b"predistill.shard"]) == {**planned, "rows": entry["rows"]}
        fields = json.loads(said[b"predistill.fields"])
        assert fields == self.store["plan"]["fields"]
        columns = {name: batch.column(name).to_pylist() for name in batch.schema.names}
        for at in range(batch.num_rows):
            sizes = {"S": len(columns["input_ids"][at]), "P": len(columns["teacher_positions"][at])}
            cells = {name: column[at] for name, column in columns.items()}
            row = {field["name"]: self._value(field, cells[field["name"]], sizes, cells) for field in fields}
            address = {name: columns[name][at] for name in ("source_index", "view", "content_hash")}
            self.rows.append({**row, **address, "split": planned["split"]})

    def _value(self, field: dict[str, Any], stored: Any, sizes: dict[str, int], row: dict[str, Any]) -> Any:
        if field["shape"][-1:] == ["K"]:
            return self._ragged(field, stored, row)
        shape = [sizes.get(size, size) for size in field["shape"]]
        if field["codec"] in ("bytes", "arrow"):
            return stored
        if field["codec"] == "int8":
            values = np.array(stored["values"], np.float64).reshape(shape)
            symbol = isinstance(field["shape"][-1], str)
            blocks = [] if symbol else [math.ceil(shape[-1] / 128)]
            scales = np.array(stored["scales"], np.float64).reshape(*shape[:-1], *blocks)
            scales = scales[..., None] if symbol else scales
            return values * (scales if symbol else np.repeat(scales, 128, axis=-1)[..., : shape[-1]])
        if field["codec"] == "uint8":
            return -np.array(stored["levels"]).reshape(shape) * np.array(stored["scales"])[..., None]
        if field["codec"] == "bitpack":
            bits = field["parameters"]["bits"]
            return np.array([self._unpack(entry, bits, shape[-1]) for entry in stored]).reshape(shape)
        values = np.array(stored).reshape(shape)
        if field["dtype"] == "bfloat16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values

    def _ragged(self, field: dict[str, Any], stored: Any, row: dict[str, Any]) -> np.ndarray:
        """Padded to the longest, as the truth is."""
        counts = row[field["parameters"]["counts"]]
        out, at = np.full((len(counts), max(counts, default=0)), field["pad"], np.float64), 0
        for position, count in enumerate(counts):
            if field["codec"] == "bitpack":
                bits = field["parameters"]["bits"]
                taken = math.ceil(count * bits / 8)
                values = self._unpack(stored[at : at + taken], bits, count)
            elif field["codec"] == "uint8":
                taken = count
                values = [-level * stored["scales"][position] for level in stored["levels"][at : at + taken]]
            else:
                taken, values = count, stored[at : at + count]
            out[position, :count] = values
            at += taken
        assert at == len(stored["levels"] if field["codec"] == "uint8" else stored)
        return out

    def _unpack(self, packed: list[int], bits: int, count: int) -> list[int]:
        stream = "".join(f"{byte:08b}" for byte in packed)
        return [int(stream[at * bits : (at + 1) * bits], 2) for at in range(count)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("stores") / "store")


def test_a_stranger_reads_every_kind_of_field(path: Path) -> None:
    read, wanted = StrangersReader(path).rows, synthetic.all_rows()
    assert len(read) == len(wanted)
    for got, want in zip(read, wanted, strict=True):
        for spec in synthetic.FIELDS:
            if spec.codec in ("bytes", "arrow"):
                assert got[spec.name] == want[spec.name]
                continue
            peak = np.abs(np.nan_to_num(want[spec.name])).max(initial=0)
            bound = synthetic.EXACT.get(spec.name, 1e-7) * peak * (1 + 1e-5) + 1e-12
            np.testing.assert_allclose(got[spec.name], want[spec.name], rtol=0, atol=bound, err_msg=spec.name)


def test_a_row_has_one_address(path: Path) -> None:
    addresses = [(row["split"], row["source_index"], row["view"]) for row in StrangersReader(path).rows]
    assert len(set(addresses)) == len(addresses) and addresses[50] == ("train", 0, 1)


def test_equal_lengths_share_their_starts(path: Path) -> None:
    """All fields of a leading "S" have the same starts in a shard; so have those of "P"."""
    for file in sorted((path / "shards").glob("*.arrow")):
        batch = pa.ipc.open_file(file.read_bytes()).get_batch(0)
        for symbol in "SP":
            starts = []
            for spec in synthetic.FIELDS:
                if spec.shape[:1] == (symbol,) and "K" not in spec.shape:
                    array = batch.column(spec.name)
                    array = array.field(0) if pa.types.is_struct(array.type) else array
                    starts.append(array.offsets.to_pylist())
            assert len(starts) > 1 and all(one == starts[0] for one in starts)


def test_samples_parquet_is_the_index(path: Path) -> None:
    table = pq.read_table(path / "samples.parquet").to_pylist()
    read = StrangersReader(path).rows
    assert [row["sample_id"] for row in table] == list(range(len(read)))
    for row, got in zip(table, read, strict=True):
        assert (row["split"], row["source_index"], row["view"]) == (got["split"], got["source_index"], got["view"])
        assert row["content_hash"] == got["content_hash"].hex()
        assert row["label"] == (None if got["labels"] == -100 else got["labels"])
        assert row["num_tokens"] == len(got["input_ids"]) and row["meta"] == got["meta"]


def test_a_shard_says_nothing_of_where_and_when_it_was_made(path: Path) -> None:
    import getpass
    import socket
    import time

    told = [str(path), socket.gethostname(), getpass.getuser() + "@", time.strftime("%Y-%m-%d")]
    for file in (path / "shards").iterdir():
        data = file.read_bytes()
        assert not [one for one in told if one.encode() in data]
