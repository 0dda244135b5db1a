"""The quickstart in small, and the text it is made of."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from pathlib import Path

import pytest
from predistill import corpus, output, quickstart
from predistill.cli import cli
from predistill.quickstart import QuickstartConfig
from predistill.store import TeacherStore
from predistill.store.errors import ConfigError


@pytest.fixture(scope="module")
def sides() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    return corpus.passages()


def test_text_is_labelled_and_ample(sides: tuple[list[dict[str, str]], ...]) -> None:
    training, validation = sides
    assert len(training) > 3000 and len(validation) > 600
    for rows in sides:
        counted = Counter(row["label"] for row in rows)
        assert set(counted) == set(corpus.FAMILIES)
        assert max(counted.values()) < 0.4 * len(rows)
    assert all(len(row["text"].split()) > 5 for row in training)


def test_the_same_python_gives_the_same_rows(sides: tuple[list[dict[str, str]], ...]) -> None:
    assert corpus.passages() == sides


def test_no_module_and_no_near_copy_is_on_both_sides(sides: tuple[list[dict[str, str]], ...]) -> None:
    training, validation = sides
    assert not {row["module"] for row in training} & {row["module"] for row in validation}
    known = {line for row in training for line in row["text"].splitlines()}
    for row in validation:
        lines = [line for line in row["text"].splitlines() if len(corpus._WORD.findall(line)) > 3]
        assert sum(line in known for line in lines) <= len(lines) / 2


@pytest.mark.slow
def test_the_story_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """40 steps in all: every part is there, and each command shown is one that the program takes."""
    folder = tmp_path / "tale"
    made = quickstart.quickstart(QuickstartConfig(
        output_dir=str(folder), rows=200, labelled=50, validation_rows=60, vocabulary=400, teacher_epochs=1,
        student_steps=4, seeds=(1, 2),
    ))  # fmt: skip
    assert made["rows"] == {"training": 200, "labelled": 50, "validation": 60}
    assert [row["model"] for row in made["table"]] == [
        "teacher",
        "student, 50 labels",
        "student, the same and the teacher",
    ]
    assert all(set(row) == set(made["columns"]) for row in made["table"])
    assert made["table"][0]["parameters"] > made["table"][1]["parameters"] == made["table"][2]["parameters"]
    assert json.loads((folder / "quickstart.json").read_text()) == json.loads(json.dumps(made))
    with TeacherStore.open(folder / "store") as store:
        [(labelled,)] = store.sql("SELECT count(label) FROM samples WHERE split = 'train'").fetchall()
        assert labelled == 50 and len(store.select(split="train")) == 200
    provenance = [json.loads((folder / "students" / name / "predistill.json").read_text())["rows"]
                  for name in ("labels-1", "distilled-1")]  # fmt: skip
    assert provenance == [50, 200]
    for line in made["commands"]:
        name, *words = shlex.split(line)[1:]
        cli.commands[name].make_context(name, words)
    stream = (tmp_path / "page.txt").open("w+")
    with stream:
        output.quickstart_page(stream, made)
        stream.seek(0)
        page = stream.read()
    assert "student, 50 labels" in page and str(folder / "store") in page
    assert "$ predistill dump" in capsys.readouterr().err


@pytest.mark.slow
def test_the_story_of_language_models_in_small(tmp_path: Path) -> None:
    folder = tmp_path / "tale"
    made = quickstart.quickstart(QuickstartConfig(
        output_dir=str(folder), task="causal-lm", rows=60, validation_rows=20, vocabulary=400, teacher_epochs=1,
        student_steps=3, seeds=(1, 2),
    ))  # fmt: skip
    assert made["rows"] == {"training": 60, "validation": 20}
    assert [row["model"] for row in made["table"]] == [
        "teacher",
        "student, 300 rows",
        "student, the same and the teacher",
    ]
    assert all(set(row) == set(made["columns"]) for row in made["table"])
    assert 0 < made["table"][0]["loss"] < 6.1  # ln 400 is 5.99: a guess among all entries
    with TeacherStore.open(folder / "store") as store:
        assert store.fields["teacher_top_k_indices"].shape == ("S", 32)
        [(wrong,)] = store.sql("SELECT count(*) FROM samples WHERE teacher_loss <= 0").fetchall()
        assert wrong == 0
    for line in made["commands"]:
        name, *words = shlex.split(line)[1:]
        cli.commands[name].make_context(name, words)


def test_code_stands_as_it_is() -> None:
    training, validation = corpus.code()
    assert len(training) > 2000 and len(validation) > 300
    assert not {row["module"] for row in training} & {row["module"] for row in validation}
    assert any("\n    " in row["text"] for row in training)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        quickstart.fresh_folder(tmp_path)
    with pytest.raises(ConfigError, match="file of that name"):
        quickstart.fresh_folder(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").exists()


def test_an_earlier_quickstart_goes(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "quickstart.json").write_text("{}")
    quickstart.fresh_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
