"""The report: its page is whole, safe and says what numpy says of the same rows."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from predistill.cli import cli
from predistill.report import ReportConfig, report
from predistill.store import ConfigError, StoreCorrupt, TeacherStore
from report_cases import Page, check_safe, samples, write_run, write_store

pytest.importorskip("matplotlib")
NAMES = ["cat", "dog", "bird"]
EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>\'"]]>-->&lt; $\\frac{$ \x00\x1b\u202e \ud800'.encode(
    "utf-8", "replace"
).decode()


def made(output: Path, *paths: Path | str) -> tuple[dict[str, Any], Page]:
    found = report(ReportConfig([str(path) for path in paths], str(output)))
    text = output.read_text(encoding="utf-8")
    assert len(text.encode()) == found["bytes"]
    return found, check_safe(text)


def shown(value: float) -> str:
    return f"{value:.4g}"


@pytest.fixture(scope="module")
def truth() -> dict[str, dict[str, np.ndarray]]:
    return {"train": samples(230, seed=1, unlabelled=70), "validation": samples(120, seed=2)}


@pytest.fixture(scope="module")
def store(truth: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = {split: [f"{split} row {at}" for at in range(len(rows["labels"]))] for split, rows in truth.items()}
    teacher = {"name": "someone/teacher", "weights_sha256": "ab" * 32}
    identity = {"teacher": teacher, "dataset": {"name": "/home/me/pets"}}
    path = tmp_path_factory.mktemp("stores") / "pets"
    return write_store(path, truth, carried={"text": texts}, label_names=NAMES, identity=identity)


@pytest.fixture(scope="module")
def page(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Page]:
    return made(tmp_path_factory.mktemp("pages") / "report.html", store)


# ---- its figures ----


def expected_error(rows: dict[str, np.ndarray]) -> float:
    """ECE by the definition: bins are (0, 1/15], (1/15, 2/15], …"""
    known = rows["labels"] >= 0
    confidence = rows["teacher_confidence"][known].astype(np.float64)
    right = (rows["teacher_prediction"] == rows["labels"])[known]
    total = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            total += inside.sum() * abs(right[inside].mean() - confidence[inside].mean())
    return total / known.sum()


def test_figures_of_splits(truth: dict[str, Any], page: tuple[dict[str, Any], Page]) -> None:
    for split, rows in truth.items():
        known = rows["labels"] >= 0
        figures = {
            "labelled": str(known.sum()),
            "accuracy": shown((rows["teacher_prediction"] == rows["labels"])[known].mean()),
            "calibration error (ECE)": shown(expected_error(rows)),
            "mean confidence": shown(rows["teacher_confidence"].mean(dtype=np.float64)),
            "mean entropy (nats)": shown(rows["teacher_entropy"].mean(dtype=np.float64)),
            "mean loss": shown(np.nanmean(rows["teacher_loss"], dtype=np.float64)),
        }
        for name, value in figures.items():
            assert page[1].column("By split", name)[split] == value, (split, name)


def test_histograms_are_numpys(truth: dict[str, Any], page: tuple[dict[str, Any], Page]) -> None:
    found = page[0]["stores"][0]["knowledge"]["histograms"]
    for column in ("teacher_confidence", "teacher_entropy", "teacher_loss"):
        for split, rows in truth.items():
            values = rows[column].astype(np.float64)
            counts, _ = np.histogram(values[~np.isnan(values)], bins=found[column]["edges"])
            assert np.abs(counts - found[column]["counts"][split]).sum() <= 2  # a value on an edge may fall either way
            assert sum(found[column]["counts"][split]) == (~np.isnan(values)).sum()


def test_confusions(truth: dict[str, Any], page: tuple[dict[str, Any], Page]) -> None:
    rows = truth["validation"]
    counts = np.zeros((3, 3), int)
    np.add.at(counts, (rows["labels"], rows["teacher_prediction"]), 1)
    table = next(table for caption, table in page[1].tables.items() if caption.startswith("Confusion matrix"))
    assert table[0] == ["label", *NAMES]
    assert [[int(cell) for cell in row[1:]] for row in table[1:]] == counts.tolist()
    wrong = counts - np.diag(np.diag(counts))
    assert page[0]["stores"][0]["knowledge"]["confusions"][0]["rows"] == wrong.max()


def test_hardest_rows(truth: dict[str, Any], page: tuple[dict[str, Any], Page]) -> None:
    every = sorted(
        (-float(loss), split, at)
        for split, rows in truth.items()
        for at, loss in enumerate(rows["teacher_loss"])
        if not np.isnan(loss)
    )[:24]
    head, *lines = page[1].tables["Hardest rows of pets"]
    assert [line[0] for line in lines] == [f"{split} {at}" for _, split, at in every]
    assert [line[head.index("text")] for line in lines] == [f"{split} row {at}" for _, split, at in every]
    first = truth[every[0][1]]
    assert lines[0][head.index("label")] == NAMES[first["labels"][every[0][2]]]
    assert lines[0][head.index("loss")] == shown(-every[0][0])


def test_costs_are_arrows(store: Path, page: tuple[dict[str, Any], Page]) -> None:
    sizes: dict[str, int] = {}
    for path in (store / "shards").glob("*.arrow"):
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        for name in table.column_names:
            sizes[name] = sizes.get(name, 0) + table[name].nbytes
    caption = "Columns, the dearest first"
    for name, cell in page[1].column(caption, "bytes").items():
        assert int(cell.replace(",", "")) == sizes[name]
        assert page[1].column(caption, "bytes a sample")[name] in (shown(sizes[name] / 350), f"{sizes[name] // 350}")


def test_what_it_says_of_the_store(page: tuple[dict[str, Any], Page]) -> None:
    assert page[1].tables["Splits"][1][:3] == ["train", "230", "5"]
    assert "someone/teacher" in page[1].text and "abababababab…" in page[1].text
    assert "pets" in page[1].text and "/home/me" not in page[1].text  # a folder of ours is nobody's business
    assert [ok for _, ok in checks_of(page[1])] == ["yes"] * 4
    headings = [int(tag[1]) for tag, _ in page[1].tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(headings, headings[1:], strict=False))


def checks_of(page: Page) -> list[list[str]]:
    return next(rows for caption, rows in page.tables.items() if caption.startswith("Checks"))


def test_equal_stores_give_equal_pages(store: Path, page: Any, tmp_path: Path) -> None:
    made(tmp_path / "again.html", store)
    script = f"from predistill.report import *; report(ReportConfig([{str(store)!r}], 'other.html'))"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "other.html").read_bytes()


# ---- strangers ----


def test_text_never_becomes_html(tmp_path: Path) -> None:
    rows = {"train": samples(60, seed=3)}
    column = "<script>alert(3)</script>"
    path = write_store(
        tmp_path / "<script>alert(4)<", rows, carried={column: {"train": [EVIL] * 60}},
        label_names=[EVIL, "</style></svg><script>alert(5)</script>", '"><b onmouseover=alert(6)>'],
        identity={"teacher": {"name": EVIL, EVIL: EVIL}, "versions": {"<script>": EVIL}}, settings={EVIL: [EVIL]},
    )  # fmt: skip
    run = write_run(tmp_path / "<script>alert(7)<", [EVIL], {"accuracy": 0.5, EVIL: 0.1}, student=EVIL, where=EVIL)
    other = write_run(tmp_path / "_$\\frac{<b>", ["labels"], {"accuracy": 0.4, EVIL: 0.2}, student=EVIL)
    _, page = made(tmp_path / "page.html", path, run, other)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text.lower() and "<b " not in text and "<b>" not in text
    assert "alert(3)" in page.text and "alert(5)" in page.text and "alert(7)" in page.text  # shown as text
    assert not {"\x00", "\x1b", "\u202e"} & set(text)
    assert {tag for tag, _ in page.tags if tag in ("img", "b")} == set()


def test_a_split_that_is_no_file_name_is_refused(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    plan = json.loads((store / "plan.json").read_text())
    plan["shards"][0]["split"] = "<script>"
    (copy / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(StoreCorrupt, match="not a plain file name"):
        report(ReportConfig([str(copy)], str(tmp_path / "page.html")))
    assert not (tmp_path / "page.html").exists()


def copied(store: Path, folder: Path) -> Path:
    import shutil

    return Path(shutil.copytree(store, folder))


def test_an_index_of_a_stranger(store: Path, tmp_path: Path) -> None:
    """Columns of other types and other names: what cannot be used is left out, what is no index is one line."""
    path = copied(store, tmp_path / "odd")
    (path / "index.duckdb").unlink()
    with duckdb.connect(str(path / "index.duckdb")) as connection:
        connection.execute(
            "CREATE TABLE samples AS SELECT 0::BIGINT sample_id, 'train' split, 0::BIGINT source_index, 0 AS view, "
            "'train-00000' shard, 0::BIGINT row, '<script>' AS label, [1] AS teacher_prediction, 'x' teacher_loss, "
            "'Infinity'::FLOAT teacher_confidence, 1e300::DOUBLE teacher_entropy, "
            '3::BIGINT num_tokens, \'<b>\' AS "a""b<i>"'
        )
        connection.execute("CREATE TABLE shards (shard VARCHAR)")
    _, page = made(tmp_path / "odd.html", path)
    assert 'a"b<i>' in page.text and ["the index has the manifest's rows", "no"] in checks_of(page)
    for table in ("nothing (a INT)", "samples (sample_id VARCHAR, split INT)"):
        (path / "index.duckdb").unlink()
        with duckdb.connect(str(path / "index.duckdb")) as connection:
            connection.execute(f"CREATE TABLE {table}")
        with pytest.raises(StoreCorrupt, match="predistill index .* --rebuild"):
            made(tmp_path / "none.html", path)


STRANGE = (
    "[]", "{", '{"stores": 3, "terms": {"a": 1}, "settings": [], "student": "x"}',
    '{"stores": [7], "stages": [1, {"terms": [2]}], "rows": NaN, "settings": {"temperature": "hot"}}',
)  # fmt: skip


@pytest.mark.parametrize("made_of", STRANGE)
def test_runs_of_a_stranger(made_of: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "predistill.json").write_text(made_of)
    (run / "metrics.json").write_text('{"eval_accuracy": Infinity, "eval_f1": [1], "eval_x": true, "eval_y": 0.25}')
    (run / "trainer_state.json").write_text(
        '{"log_history": [1, {"step": "a", "loss": 1}, {"step": 1, "loss": NaN}, {"step": 2, "eval_y": 0.5}]}'
    )
    found, page = made(tmp_path / "page.html", run)
    assert found["runs"][0]["metrics"] == {"y": 0.25}
    assert page.tables["Every run, and its last evaluation"][1][:2] == ["run", "0.25"]


# ---- every kind of store ----


def test_an_unfinished_store(truth: dict[str, Any], tmp_path: Path) -> None:
    path = write_store(tmp_path / "half", truth, only=2)
    before = sorted(one.name for one in path.rglob("*"))
    _, page = made(tmp_path / "page.html", path)
    assert "unfinished: 2 of 8 shards are there" in page.text
    kept = {name: values[:100] for name, values in truth["train"].items()}
    right = kept["teacher_prediction"] == kept["labels"]
    assert page.column("By split", "accuracy")["train"] == shown(right[kept["labels"] >= 0].mean())
    assert sorted(one.name for one in path.rglob("*")) == before  # nothing is written into it


def test_a_store_with_nothing_yet(truth: dict[str, Any], tmp_path: Path) -> None:
    _, page = made(tmp_path / "page.html", write_store(tmp_path / "none", truth, only=0))
    assert "0 of 8 shards" in page.text and "Nothing is stored yet" in page.text


def test_an_empty_split(truth: dict[str, Any], tmp_path: Path) -> None:
    empty = {name: values[:0] for name, values in truth["train"].items()}
    _, page = made(tmp_path / "page.html", write_store(tmp_path / "s", {"train": truth["train"], "test": empty}))
    assert "Split test has no rows" in page.text
    assert page.column("By split", "accuracy")["test"] == "–"
    _, page = made(tmp_path / "page.html", write_store(tmp_path / "t", {"train": empty}))
    assert "Split train has no rows" in page.text


def test_without_labels_or_summaries(truth: dict[str, Any], tmp_path: Path) -> None:
    rows = truth["train"]
    missing = {"labels": np.full_like(rows["labels"], -100), "teacher_loss": np.full(230, np.nan, np.float32)}
    unlabelled = {**rows, **missing}
    found, page = made(tmp_path / "page.html", write_store(tmp_path / "s", {"train": unlabelled}))
    assert "no label a row" in page.text and "Confusion matrix" not in page.text
    hardest = found["stores"][0]["hardest"]
    assert hardest["by"] == "teacher_entropy"
    assert hardest["rows"][0]["source_index"] == int(rows["teacher_entropy"].argmax())
    bare = write_store(tmp_path / "t", {"train": {"labels": rows["labels"]}}, label_names={"not": "a list"})
    _, page = made(tmp_path / "page.html", bare)
    assert "keeps no summaries" in page.text


def test_a_thousand_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from predistill.report_page.asked import Asked

    rows = samples(3000, classes=1000, seed=4)
    names = [f"class {at}" for at in range(1000)]
    path = write_store(tmp_path / "s", {"validation": rows}, label_names=names, shard_rows=999)
    answers: list[int] = []
    ask = Asked.rows

    def counted(self: Asked, query: str) -> list[Any]:
        lines = ask(self, query)
        answers.append(len(lines))
        return lines

    monkeypatch.setattr(Asked, "rows", counted)
    found, page = made(tmp_path / "page.html", path)
    assert max(answers) <= 100  # never a full table, nor a matrix of a million
    assert "Confusion matrix" not in page.text
    assert found["bytes"] < 400_000
    known = found["stores"][0]["knowledge"]
    assert len(known["confusions"]) == 20
    first = known["confusions"][0]
    pair = (rows["labels"] == int(first["label"][6:])) & (rows["teacher_prediction"] == int(first["prediction"][6:]))
    assert pair.sum() == first["rows"]


def test_a_language_model(tmp_path: Path) -> None:
    import torch
    from language_store import write_store as write_language

    generator = torch.Generator().manual_seed(0)
    table = torch.randn(20, 20, generator=generator)
    rows = [([1, 2, 3, 4, 5][: 2 + at % 4], [1, 2, 3, 4, 5][: 2 + at % 4]) for at in range(20)]
    opened = write_language(tmp_path / "s", {"train": rows}, lambda ids: table[torch.as_tensor(ids)])
    opened.close()
    found, page = made(tmp_path / "page.html", tmp_path / "s")
    tokens = sum(len(ids) for ids, _ in rows)
    field = next(one for one in found["stores"][0]["fields"] if one["name"] == "teacher_top_k_logits")
    assert field["bytes"] == tokens * 5 * 4 + 20 * 8  # float32, k = 5; a start a row
    assert field["bytes_per_token"] == field["bytes"] / tokens
    assert "documents" in page.text
    assert "num_tokens" in found["stores"][0]["knowledge"]["histograms"]


def test_pictures_of_the_hardest_rows(truth: dict[str, Any], tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")

    def picture(at: int) -> bytes:
        file = io.BytesIO()
        image.new("RGB", (200 + at, 100), (at, 255 - at, 7)).save(file, "PNG")
        return file.getvalue()

    files = [picture(at) for at in range(120)]
    worst = np.argsort(-truth["validation"]["teacher_loss"], kind="stable")[:24]
    files[worst[1]] = b"<svg onload=alert(1)>"
    path = write_store(tmp_path / "s", {"validation": truth["validation"]}, images={"validation": files})
    found, page = made(tmp_path / "page.html", path)
    sources = [values["src"] or "" for tag, values in page.tags if tag == "img"]
    assert len(sources) == 23 and "1 of these pictures could not be read" in page.text
    small = image.open(io.BytesIO(base64.b64decode(sources[0].partition(",")[2])))
    assert small.size == (96, round(100 * 96 / (200 + worst[0])))
    assert np.abs(np.asarray(small.convert("RGB"))[20, 40].astype(int) - [worst[0], 255 - worst[0], 7]).max() < 6
    assert "thumbnail" not in json.dumps(found["stores"][0]["hardest"])


def test_a_store_elsewhere(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREDISTILL_CACHE", str(tmp_path / "cache"))
    (copied(store, tmp_path / "bucket") / "index.duckdb").unlink()
    found, page = made(tmp_path / "page.html", f"file://{tmp_path / 'bucket'}")
    assert found["stores"][0]["fields"][0]["bytes"] is None
    assert page.column("By split", "accuracy")["validation"] not in ("–", "")
    TeacherStore.open(store).close()


# ---- runs ----


@pytest.fixture
def runs(tmp_path: Path, store: Path) -> list[Path]:
    mark = json.loads((store / "store.json").read_text())["fingerprint"]
    reached = {"labels": (0.60, 0.66), "teacher": (0.72, 0.80)}
    return [
        write_run(tmp_path / f"{kind}-{seed}", ["labels", *(["logits"] if kind == "teacher" else [])],
                  {"accuracy": value, "teacher_agreement": value + 0.1, "loss": 1 - value}, seed, fingerprint=mark)
        for kind, values in reached.items()
        for seed, value in enumerate(values, 1)
    ]  # fmt: skip


def test_runs_are_compared(runs: list[Path], store: Path, truth: dict[str, Any], tmp_path: Path) -> None:
    found, page = made(tmp_path / "page.html", store, *runs)
    caption = "Every run, and its last evaluation"
    assert list(page.column(caption, "accuracy").items()) == [
        ("labels-1", "0.6"), ("labels-2", "0.66"), ("teacher-1", "0.72"), ("teacher-2", "0.8"),
    ]  # fmt: skip
    assert page.column(caption, "teacher agreement")["teacher-2"] == "0.9"
    (gain,) = found["gains"]
    assert gain["difference"] == pytest.approx(np.mean([0.72, 0.80]) - np.mean([0.60, 0.66]))
    assert gain["with_deviation"] == pytest.approx(np.std([0.72, 0.80], ddof=1))
    assert gain["better"] and gain["same_rows"]
    assert page.column("Distillation gain", "mean with")["teacher-1 + 1"] == "0.76\u00a0±\u00a00.057"
    rows = truth["validation"]
    accuracy = (rows["teacher_prediction"] == rows["labels"]).mean()
    assert found["teachers"][0]["accuracy"] == pytest.approx(accuracy)
    assert found["runs"][0]["curves"]["train loss"] == [(10, 0.9), (20, 0.4)]
    assert "hf_secret" not in (tmp_path / "page.html").read_text()
    assert str(tmp_path) not in (tmp_path / "page.html").read_text()


def test_less_is_better(tmp_path: Path) -> None:
    taught = write_run(tmp_path / "a", ["logits"], {"perplexity": 20.0})
    plain = write_run(tmp_path / "b", ["labels"], {"perplexity": 25.0})
    (gain,) = made(tmp_path / "page.html", taught, plain)[0]["gains"]
    assert gain["difference"] == -5 and gain["better"]


def test_runs_that_have_not_ended(runs: list[Path], tmp_path: Path) -> None:
    started = write_run(tmp_path / "started", ["logits"], None)
    going = write_run(tmp_path / "going", ["logits"], {"accuracy": 0.5})
    (going / "metrics.json").unlink()
    for step in ("checkpoint-9", "checkpoint-20", "checkpoint-x"):
        (going / step).mkdir()
    (going / "trainer_state.json").rename(going / "checkpoint-20" / "trainer_state.json")
    _, page = made(tmp_path / "page.html", started, going)
    assert "started: It has no metrics" in page.text
    assert page.column("Every run, and its last evaluation", "accuracy") == {"started": "–", "going": "0.5"}
    doubled = write_run(tmp_path / "more" / "labels-1", ["logits"], {"accuracy": 0.5})
    _, page = made(tmp_path / "page.html", runs[0], doubled, runs[0])
    assert [row[0] for row in page.tables["Every run, and its last evaluation"][1:]] == [
        f"{tmp_path.name}/labels-1", "more/labels-1",
    ]  # fmt: skip


# ---- the command ----


def test_the_command(store: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(cli, ["report", str(store), "--output", str(tmp_path / "new" / "page.html"), "--json"])
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert found["output"] == str(tmp_path / "new" / "page.html") and found["stores"][0]["samples"] == 350
    page = CliRunner().invoke(cli, ["report", str(store), "--output", str(tmp_path / "new" / "page.html")])
    assert page.exit_code == 0 and "page.html" in page.stdout  # its own page is replaced


@pytest.mark.parametrize("case", ["missing", "folder", "file", "no report", "is a folder"])
def test_what_is_refused(case: str, store: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("notes")
    (tmp_path / "students" / "a").mkdir(parents=True)
    (tmp_path / "students" / "a" / "metrics.json").write_text("{}")
    words, said = {
        "missing": ([str(tmp_path / "absent")], "does not exist"),
        "folder": ([str(tmp_path)], "it holds some: give"),
        "file": ([str(tmp_path / "mine.txt")], "neither a store"),
        "no report": ([str(store), "--output", str(tmp_path / "mine.txt")], "which no report made"),
        "is a folder": ([str(store), "--output", str(tmp_path)], "it is a folder"),
    }[case]
    done = CliRunner().invoke(cli, ["report", *words])
    assert done.exit_code == 1 and said in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "mine.txt").read_text() == "notes"


def test_nothing_is_asked_for() -> None:
    assert CliRunner().invoke(cli, ["report"]).exit_code == 2
    with pytest.raises(ConfigError, match="at least one folder"):
        report(ReportConfig([]))


def test_without_matplotlib(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install predistill\[report\]"):
        report(ReportConfig([str(store)]))


def test_the_page_of_the_docs_runs(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "report.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (said,) = re.findall(r"prints `([^`]*)`", text)
    assert done.stdout.strip() == said
    page = check_safe((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "pets" in page.text and "Distillation gain" in page.tables
