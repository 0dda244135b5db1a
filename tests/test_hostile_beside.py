"""What a stranger put beside the shards: a card, an index, a tokenizer. It neither hangs, nor misleads, nor runs."""

from __future__ import annotations

import builtins
import decimal
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import yaml
from classification_store import random_rows, write_store
from predistill.store import ConfigError, FieldSpec, Plan, ShardPlan, StoreCorrupt, StoreWriter, TeacherStore
from predistill.store.card import licences_in
from predistill.store.verify import rebuild_index, verify

pytestmark = pytest.mark.timeout(60)
ROWS = 6

# ---- README.md ----

MERGED = "a0: &a0 {x: 1}\n" + "".join(
    f"a{at}: &a{at} {{<<: [{','.join([f'*a{at - 1}'] * 9)}]}}\n" for at in range(1, 12)
)


@pytest.mark.parametrize(
    "card",
    [
        f"---\n{MERGED}---\n", "---" + "\n" * 20_000, "---\n" + "license:\n" * 9_000 + "---\n",
        "---\nlicense: 2001-99-99\n---\n", "---\nlicense: !!int x\n---\n", "---\nlicense: !!timestamp x\n---\n",
        '---\nlicense: "\\UFFFFFFFF"\n---\n', f"---\nlicense: {'[' * 900}\n---\n", f"---\n{'{a: ' * 9_000}\n---\n",
        "---\nlicense:\n- mit\n---\n", "---\nlicense: a\x00b\n---\n", f"---\nlicense: {'x' * 9_000}\n---\n",
    ],
)  # fmt: skip
@pytest.mark.timeout(5)
def test_cards_that_say_nothing(card: str) -> None:
    assert licences_in(card) == {}


@pytest.mark.parametrize(
    "text", ["mit", "7", "it's: [a] {b}", "# x", "é 漢字", "2001-01-01", "*x", "&y", "no", "many words " * 30 + "end"]
)
def test_any_licence_comes_back(text: str) -> None:
    head = {"pretty_name": "x", "license": text, "tags": ["a"], "dataset_license": text}
    card = f"---\n{yaml.safe_dump(head, allow_unicode=True, sort_keys=False)}---\nlicense: another\n"
    assert licences_in(card) == {"license": text, "dataset_license": text}


def test_cards_of_others() -> None:
    assert licences_in(f"---\r\nlicense: mit  # as the code\r\n{MERGED}tags: [\r\n--- \r\nx") == {"license": "mit"}
    assert licences_in("---\nteacher_license: >-\n  a\n  b\n\nlicense: mit\n---") == {
        "license": "mit", "teacher_license": "a b",
    }  # fmt: skip


# ---- index.duckdb ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("beside") / "store"
    logits = np.arange(ROWS * 3, dtype=np.float32).reshape(ROWS, 3)
    write_store(path, {"train": random_rows(ROWS, 1, 50)}, {"train": logits}, {"train": np.arange(ROWS)}).close()
    return path


def spoilt(whole: Path, to: Path, *statements: str) -> Path:
    shutil.copytree(whole, to)
    with duckdb.connect(str(to / "index.duckdb")) as connection:
        for statement in statements:
            connection.execute(statement)
    return to


ENDLESS = "WITH RECURSIVE t(n) AS (SELECT 0::BIGINT UNION ALL SELECT n + 1 FROM t) SELECT n FROM t"
MINE = "ALTER TABLE samples RENAME TO mine"
COMPUTED = (
    MINE,
    "CREATE TABLE samples (sample_id BIGINT, split VARCHAR, source_index BIGINT, view INTEGER, shard VARCHAR, "
    "row BIGINT, label BIGINT, num_tokens BIGINT GENERATED ALWAYS AS (row * 1000))",
    "INSERT INTO samples SELECT sample_id, split, source_index, view, shard, row, label FROM mine",
)


@pytest.mark.parametrize(
    "statements",
    [
        (MINE, f"CREATE VIEW samples AS SELECT * FROM mine WHERE label IN ({ENDLESS})"),
        (MINE, f"CREATE VIEW samples AS SELECT * FROM mine WHERE label IN ({ENDLESS})",
         "CREATE MACRO duckdb_tables() AS TABLE SELECT 'index', 'main', 'samples', 6, ''"),
        ("DROP TABLE shards", f"CREATE VIEW shards AS {ENDLESS}"),
        COMPUTED,
        ("DROP TABLE samples",),
        ("ALTER TABLE samples DROP sample_id",),
        ("UPDATE samples SET sample_id = sample_id + 1000000",),
        ("UPDATE samples SET sample_id = sample_id - 1",),
        ("UPDATE samples SET sample_id = NULL",),
        ("ALTER TABLE samples ALTER sample_id TYPE VARCHAR",),
        ("ALTER TABLE samples ALTER sample_id TYPE DOUBLE", "UPDATE samples SET sample_id = 'nan'::DOUBLE"),
        ("ALTER TABLE samples ALTER sample_id TYPE HUGEINT",),
        ("ALTER TABLE samples ALTER num_tokens TYPE VARCHAR",),
        ("INSERT INTO samples FROM samples",),
    ],
)  # fmt: skip
@pytest.mark.timeout(20, method="thread")  # DuckDB at work hears no signal
def test_an_index_that_is_none(whole: Path, tmp_path: Path, statements: tuple[str, ...]) -> None:
    path = spoilt(whole, tmp_path / "store", *statements)
    with TeacherStore.open(path) as store, pytest.raises(StoreCorrupt, match=f"index {path} --rebuild$"):
        store.select(where="label >= 0")
        store.sql("FROM samples").fetchall()


@pytest.mark.timeout(20, method="thread")  # DuckDB at work hears no signal
def test_verify_says_so_and_a_rebuild_mends_it(whole: Path, tmp_path: Path) -> None:
    path = spoilt(whole, tmp_path / "store", MINE, f"CREATE VIEW samples AS SELECT * FROM mine, ({ENDLESS})")
    with TeacherStore.open(path) as store, pytest.raises(StoreCorrupt, match="has no table samples"):
        store.longest(range(ROWS))
    (problem,) = verify(path)["problems"]
    assert problem["kind"] == "index" and problem["detail"].count("--rebuild") == 1
    rebuild_index(path)
    with TeacherStore.open(path) as store:
        assert store.select(where="label >= 0").sample_ids.tolist() == list(range(ROWS))
        assert store.longest(range(ROWS)) is not None
    assert verify(path)["ok"]


def test_its_macros_are_not_called(whole: Path, tmp_path: Path) -> None:
    macros = ("abs(x) AS 7", '"+"(a, b) AS 7', "hash(x) AS 7", "count() AS 7", "mine(x) AS 7")
    path = spoilt(whole, tmp_path / "store", "CREATE SCHEMA system", *(f"CREATE MACRO {macro}" for macro in macros))
    with TeacherStore.open(path) as store:
        assert store.select(where="abs(label) + sample_id >= 8").sample_ids.tolist() == [4, 5]
        assert store.sql("SELECT count() FROM samples").fetchall() == [(ROWS,)]
    assert verify(path)["ok"]


def test_a_column_named_as_the_indexs_own(tmp_path: Path) -> None:
    path = carried(tmp_path / "store", pa.array([70, 80]), "sample_id")
    with TeacherStore.open(path) as store:
        assert store.select(where="row >= 0").sample_ids.tolist() == [0, 1]


def test_views_that_are_null() -> None:
    from predistill.student_train.spans import questions_of

    store = SimpleNamespace(path="here", sql=lambda _: duckdb.sql("SELECT NULL::INT AS view FROM range(3)"))
    with pytest.raises(StoreCorrupt, match="--rebuild"):
        questions_of(SimpleNamespace(store=store, sample_ids=np.arange(3)))


def carried(path: Path, values: pa.Array, name: str = "odd") -> Path:
    fields = [
        FieldSpec("teacher_logits", (2,), "float32"),
        FieldSpec(name, (), "any", codec="arrow", role="carried"),
    ]
    shard = ShardPlan("train", 0, 0, 2)
    with StoreWriter.begin(path, Plan("text-classification", {}, {}, fields, [shard])) as writer:
        builder = writer.open_shard(shard, 2, {})
        builder.put("teacher_logits", np.arange(2), np.zeros((2, 2)))
        builder.put_column(name, values)
        builder.put_addresses(np.zeros((2, 16), np.uint8))
        writer.commit(builder)
        writer.finish()
    return path


FAR = pa.array([2**62, -(2**62)], pa.int64())


@pytest.mark.parametrize(
    "values",
    [FAR.view(pa.timestamp("s")), FAR.view(pa.duration("s")), pa.array([b"\xff\xfe", b"ok"]).view(pa.string())],
    ids=["timestamps", "durations", "text"],
)
def test_columns_that_no_index_holds(tmp_path: Path, values: pa.Array) -> None:
    with pytest.raises(StoreCorrupt, match="column '?odd'?") as said:
        carried(tmp_path / "store", values)
    assert "\n" not in str(said.value)
    assert not list((tmp_path / "store").glob("*.tmp*"))


def test_decimals_stay_out_of_it(tmp_path: Path) -> None:
    path = carried(tmp_path / "store", pa.array([decimal.Decimal("1" * 38), None], pa.decimal256(76, 0)))
    assert verify(path)["ok"]
    with TeacherStore.open(path) as store:
        assert "odd" not in store.sql("FROM samples").columns
        assert store.select().column("odd")[1] is None


# ---- tokenizer/ and processor/ ----

EVIL = "open({!r}, 'w')\nclass Evil: pass"
AUTO_MAP = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoImageProcessor": "evil.Evil"}}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked on the terminal; it is answered with yes."""
    said: list[Any] = []

    def answer(*question: object) -> str:
        said.append(question)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    return said


@pytest.mark.parametrize(
    "folder, files",
    [
        ("tokenizer", {"tokenizer.json": "{}"}),
        ("tokenizer", {"tokenizer_config.json": "[" * 3000}),
        ("tokenizer", {"tokenizer_config.json": json.dumps({"tokenizer_class": "../../x"})}),
        ("tokenizer", {"tokenizer_config.json": json.dumps({**AUTO_MAP, "tokenizer_class": "Evil"})}),
        ("tokenizer", {}),
        ("processor", {"preprocessor_config.json": "["}),
        ("processor", {"preprocessor_config.json": json.dumps({**AUTO_MAP, "image_processor_type": "Evil"})}),
    ],
)
def test_a_tokenizer_that_is_none(
    whole: Path, tmp_path: Path, asked: list[Any], folder: str, files: dict[str, str]
) -> None:
    from predistill.student_train.tokens import store_tokenizer

    path, ran = tmp_path / "store", tmp_path / "ran"
    shutil.copytree(whole, path)
    (path / folder).mkdir()
    for name, text in {**files, "evil.py": EVIL.format(str(ran))}.items():
        (path / folder / name).write_text(text)
    with TeacherStore.open(path) as store, pytest.raises(StoreCorrupt, match=f"^{path / folder} ") as said:
        store_tokenizer(store)
    assert "\n" not in str(said.value) and not asked and not ran.exists()


def test_the_teacher_that_a_store_names(tmp_path: Path, asked: list[Any]) -> None:
    from predistill.student_train.students import from_teacher_layers

    (tmp_path / "evil.py").write_text(EVIL.format(str(tmp_path / "ran")))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    with pytest.raises(ConfigError, match="cannot be read"):
        from_teacher_layers(tmp_path, [1], SimpleNamespace())  # type: ignore[arg-type]
    assert not asked and not (tmp_path / "ran").exists()
