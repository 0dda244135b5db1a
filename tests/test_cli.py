"""The command line as people and scripts meet it: stdout, exit codes, one line an error."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from predistill import flags, output
from predistill.cli import cli
from predistill.store.errors import ConfigError

TEXTS = ["a warm and funny film", "the plot is thin", "one of the best", None, "dull from the first scene"] * 4


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 rows; every fifth label is missing."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {"text": text or "and", "label": None if at % 5 == 4 else at % 2, "page": at} for at, text in enumerate(TEXTS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def words(teacher: Path, rows: Path | str, store: Path | str, *more: str) -> list[str]:
    return ["--teacher", str(teacher), "--dataset", str(rows), "--task", "text-classification",
            "--output-dir", str(store), *more]  # fmt: skip


@pytest.fixture(scope="module")
def store(tiny_teacher_dir: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that the command line made: 20 rows of train and of validation."""
    folder = tmp_path_factory.mktemp("cli") / "store"
    data = f"train={rows_file},validation={rows_file}"
    said = invoke("dump", *words(tiny_teacher_dir, data, folder, "--keep-columns", "page", "--json"))
    assert said.exit_code == 0, said.output
    made = json.loads(said.stdout)
    assert made["complete"] and {"seconds", "teacher_seconds", "tokens_per_second"} <= set(made)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student") / "config.json"
    path.write_text(json.dumps({
        "model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "intermediate_size": 8, "max_position_embeddings": 64,
    }))  # fmt: skip
    return path


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, list(args), prog_name="predistill")


def refused(*args: str, code: int = 1) -> str:
    """The one line on stderr of a command that must fail, with nothing on stdout."""
    said = invoke(*args)
    assert said.exit_code == code, said.output
    assert said.stdout == ""
    lines = [line for line in said.stderr.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1 and "Traceback" not in said.stderr, said.stderr
    return lines[0]


def program(*args: str, **more: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more.pop("env", {})}
    return subprocess.Popen([sys.executable, "-m", "predistill", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=environment, **more)  # fmt: skip


# ---- a newcomer's day ----


def test_info(store: Path) -> None:
    made = json.loads(invoke("info", str(store), "--json").stdout)
    assert made["task"] == "text-classification" and made["complete"] is True
    assert made["splits"]["train"]["samples"] == 20
    assert made["fields"]["teacher_logits"]["dtype"] == "float16"
    assert {"format_version", "bytes", "teacher", "tokenizer", "dataset"} <= set(made)
    page = invoke("info", str(store)).stdout
    assert "teacher_logits" in page and "negative, positive" in page and "\x1b" not in page


def test_query_in_three_forms(store: Path) -> None:
    sql = "SELECT sample_id, label, page, split FROM samples WHERE split = 'train' ORDER BY sample_id"
    as_json = json.loads(invoke("query", str(store), sql, "--format", "json").stdout)
    as_csv = list(csv.DictReader(io.StringIO(invoke("query", str(store), sql, "--format", "csv").stdout)))
    assert len(as_json) == len(as_csv) == 20
    assert [row["page"] for row in as_json] == list(range(20)) == [int(row["page"]) for row in as_csv]
    assert as_json[4]["label"] is None and as_csv[4]["label"] == "" and as_json[0]["label"] == 0
    assert invoke("query", str(store), sql).stdout.splitlines()[0].split() == ["sample_id", "label", "page", "split"]
    assert (
        json.loads(invoke("query", str(store), sql.replace("ORDER", "AND false ORDER"), "--format", "json").stdout)
        == []
    )


def test_query_of_many_rows_says_where_a_table_ends(store: Path) -> None:
    said = invoke("query", str(store), "SELECT a.sample_id FROM samples a, samples b, shards")
    assert len(said.stdout.splitlines()) == output.TABLE_ROWS + 1
    assert "--format csv" in said.stderr


@pytest.mark.parametrize("sql", [
    "DROP TABLE samples",
    "SELECT * FROM read_csv('/etc/passwd')",
    "COPY samples TO 'stolen.csv'",
    "SET enable_external_access = true",
    "SELECT nothing FROM samples",
    "SELECT error('now') FROM samples",
    "",
])  # fmt: skip
def test_query_reads_only_the_store(store: Path, sql: str) -> None:
    refused("query", str(store), sql)


def test_verify_and_index(store: Path) -> None:
    assert json.loads(invoke("verify", str(store), "--json").stdout)["ok"] is True
    assert invoke("verify", str(store)).stdout.startswith("ok: 2 shards, 40 samples")
    assert json.loads(invoke("index", str(store), "--rebuild", "--json").stdout) == {"samples": 40, "shards": 2}
    assert json.loads(invoke("verify", str(store), "--json").stdout)["problems"] == []


def test_verify_prints_its_document_when_not_all_is_well(store: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(store, broken)
    shard = broken / "shards" / "train-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    said = invoke("verify", str(broken), "--json")
    found = json.loads(said.stdout)
    assert said.exit_code == 1 and not found["ok"]
    assert [problem["path"] for problem in found["problems"]] == ["shards/train-00000.arrow"]
    assert "train-00000.arrow" in invoke("verify", str(broken)).stdout


def test_plan_and_dry_run_write_nothing(tiny_teacher_dir: Path, rows_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    made = json.loads(invoke("plan", *words(tiny_teacher_dir, rows_file, folder, "--json")).stdout)
    assert {"bytes", "bytes_per_sample", "shards", "samples", "seconds", "free_bytes"} <= set(made)
    page = invoke("dump", *words(tiny_teacher_dir, rows_file, folder, "--dry-run"))
    assert page.exit_code == 0 and "free on disk" in page.stdout
    assert not folder.exists()


def test_train_with_flags_file_and_rare_arguments(store: Path, student: Path, tmp_path: Path) -> None:
    """A flag beats the file; a TrainingArguments field that --help does not show is taken from both."""
    file = tmp_path / "run.yaml"
    file.write_text(
        f"student_config: {student}\nlearning-rate: 1e-3\nmax_steps: 50\nadam_beta1: 0.8\nalpha: 0.5\n"
        "save_strategy: 'no'\nper_device_train_batch_size: 8\n"
    )
    folder = tmp_path / "run"
    said = invoke("train", str(store), "--config", str(file), "--max-steps", "2", "--output-dir", str(folder),
                  "--adam-epsilon", "1e-6", "--json")  # fmt: skip
    assert said.exit_code == 0, said.output
    made = json.loads(said.stdout)
    assert {"eval_accuracy", "train_loss", "train_runtime", "student_parameters", "output_dir"} <= set(made)
    assert json.loads((folder / "metrics.json").read_text()) == made
    arguments = json.loads((folder / "predistill.json").read_text())["training_arguments"]
    assert (arguments["max_steps"], arguments["adam_beta1"], arguments["adam_epsilon"]) == (2, 0.8, 1e-6)
    assert arguments["learning_rate"] == 1e-3


# ---- what is refused, and how ----


def test_usage_errors_exit_2(store: Path) -> None:
    for args in (
        ["nothing"],
        ["dump", "--nothing"],
        ["dump"],
        ["train"],
        ["train", str(store), "--output-dir", "x", "--learning-rat", "1"],
        ["train", str(store), "--learning-rate", "fast", "--output-dir", "x"],
        ["query", str(store), "SELECT 1", "--format", "xml"],
        ["index", str(store)],
        ["dump", "--task", "translation"],
        ["dump", "--shard-size", "big"],
    ):
        said = invoke(*args)
        assert said.exit_code == 2 and "Error:" in said.stderr and said.stdout == "", args


@pytest.mark.parametrize("command", [["info"], ["verify"], ["index", "--rebuild"], ["query", "SELECT 1"]])
def test_a_store_that_is_not_there(command: list[str], tmp_path: Path) -> None:
    name, *more = command
    assert "nowhere" in refused(name, str(tmp_path / "nowhere"), *more)
    (tmp_path / "file").write_text("x")
    refused(name, str(tmp_path / "file"), *more)
    refused(name, str(tmp_path), *more)


def test_dump_names_what_is_wrong(tiny_teacher_dir: Path, rows_file: Path, tmp_path: Path) -> None:
    def dump(*more: str, teacher: Path | None = None, rows: Path | str = rows_file) -> str:
        return refused("dump", *words(teacher or tiny_teacher_dir, rows, tmp_path / "store", *more))

    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n')
    assert "body" in dump("--text-column", "body")
    assert "nothere.csv" in dump(rows=tmp_path / "nothere.csv")
    assert "teacher" in dump(teacher=tmp_path / "no-teacher")
    assert "empty" in dump(rows=empty)
    dump(rows=broken)
    assert "layers" in dump("--layers", "99")
    assert "attentions" in dump("--fields", "logits,attention")
    assert "layers 0 (embeddings) to 2" in dump("--fields", "logits,attentions", "--layers", "3")
    assert "color" in dump("--keep-columns", "color")
    assert "validation" in dump("--split", "validation")
    assert not (tmp_path / "store" / "store.json").exists()


def test_a_folder_that_holds_something_else(tiny_teacher_dir: Path, rows_file: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    refused("dump", *words(tiny_teacher_dir, rows_file, tmp_path))
    refused("dump", *words(tiny_teacher_dir, rows_file, tmp_path, "--overwrite"))
    refused("dump", *words(tiny_teacher_dir, rows_file, tmp_path / "thesis.tex"))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_the_same_dump_again_is_done_and_another_is_refused(
    store: Path, tiny_teacher_dir: Path, rows_file: Path
) -> None:
    again = words(tiny_teacher_dir, f"train={rows_file},validation={rows_file}", store)
    assert invoke("dump", *again, "--keep-columns", "page", "--json").exit_code == 0
    line = refused("dump", *again, "--keep-columns", "page", "--dtype", "float32")
    assert "float16" in line and "float32" in line


def test_train_names_what_is_wrong(store: Path, student: Path, tmp_path: Path) -> None:
    def train(*more: str) -> str:
        return refused("train", str(store), "--output-dir", str(tmp_path / "run"), *more)

    config = ["--student-config", str(student)]
    assert "--student" in train()
    assert "tutorail" in train(*config, "--preset", "tutorail")
    assert "alpha" in train(*config, "--alpha", "2")
    assert "no_such_column" in train(*config, "--where", "no_such_column > 1")
    train(*config, "--where", "teacher_confidence > 2")
    assert "nowhere.json" in train("--student-config", "nowhere.json")
    assert "sometimes" in train(*config, "--eval-strategy", "sometimes")
    (tmp_path / "file").write_text("x")
    refused("train", str(store), *config, "--output-dir", str(tmp_path / "file"))


@pytest.mark.parametrize("text,named", [
    ("tempature: 3\n", "tempature"),
    ("- alpha\n", "list"),
    ("alpha: [\n", "YAML"),
    ("alpha: warm\n", "alpha"),
    ("alpha: [1, 2]\n", "alpha"),
])  # fmt: skip
def test_a_config_file_that_is_wrong(store: Path, student: Path, tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    line = refused("train", str(store), "--student-config", str(student), "--output-dir", "x", "--config", str(file))
    assert named in line and "run.yaml" in line


def test_a_config_file_that_is_not_there(tmp_path: Path) -> None:
    assert "nowhere.yaml" in refused("dump", "--config", str(tmp_path / "nowhere.yaml"))


def test_unexpected_errors_are_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from predistill.store import verify

    def fail(path: str) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(verify, "describe", fail)
    assert refused("info", "store") == "Error: RuntimeError: two lines (--traceback shows where)"
    said = invoke("info", "store", "--traceback")
    assert "Traceback" in said.stderr and said.stderr.endswith("Error: RuntimeError: two lines\n")


# ---- streams and signals, in processes of their own ----


def test_json_is_alone_on_stdout(store: Path) -> None:
    """Even when a library prints from Python, from C, and after everything is done."""
    script = (
        "import atexit, ctypes, os, sys\n"
        "from predistill.store import verify\n"
        "real = verify.describe\n"
        "def noisy(path):\n"
        "    print('python'); os.write(1, b'descriptor\\n'); ctypes.CDLL(None).puts(b'buffered in C')\n"
        "    atexit.register(lambda: os.write(1, b'at exit\\n'))\n"
        "    return real(path)\n"
        "verify.describe = noisy\n"
        "from predistill.cli import main\n"
        f"sys.argv = ['predistill', 'info', {str(store)!r}, '--json']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["complete"]
    for said in ("python", "descriptor", "buffered in C", "at exit"):
        assert said in done.stderr


def test_a_closed_pipe_is_no_error(store: Path) -> None:
    running = program("query", str(store), "SELECT a.* FROM samples a, samples b, samples c", "--format", "csv")
    with running:
        assert running.stdout and running.stderr
        assert running.stdout.readline().startswith("sample_id")
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "number,code,said", [(signal.SIGINT, 130, "Interrupted."), (signal.SIGTERM, 143, "Terminated.")]
)
def test_a_dump_can_be_stopped_and_goes_on(
    number: signal.Signals, code: int, said: str, tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"a film of the year {at},{at % 2}\n" for at in range(30_000)))
    command = words(
        tiny_teacher_dir, rows, tmp_path / "store", "--shard-size", "20kB", "--tokens-per-batch", "256", "--json"
    )
    running = program("dump", *command)
    wait_for(lambda: len(list(tmp_path.glob("store/shards/*.json"))) > 1, running)
    with running:
        running.send_signal(number)
        stdout, stderr = running.communicate(timeout=120)
    assert running.returncode == code, stderr
    assert stdout == "" and "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith(said)
    line = refused("info", str(tmp_path / "nothing"))  # the program itself is as before
    assert line
    found = json.loads(invoke("info", str(tmp_path / "store"), "--json").stdout)
    assert found["complete"] is False and found["splits"]["train"]["shards"] > 1


def wait_for(done: Callable[[], bool], running: subprocess.Popen[str], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert running.poll() is None, running.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.02)


# ---- flags ----


@dataclasses.dataclass
class Every:
    """One field of each kind."""

    needed: str = dataclasses.field(metadata={"help": "A word."})
    size: int = dataclasses.field(default=256 * 10**6, metadata={"help": "How big.", "unit": "bytes"})
    names: list[str] = dataclasses.field(default_factory=list, metadata={"help": "Names."})
    numbers: list[int] = dataclasses.field(default_factory=lambda: [1, 2], metadata={"help": "Numbers."})
    loud: bool = dataclasses.field(default=False, metadata={"help": "Loudly."})
    kept: bool | None = dataclasses.field(default=None, metadata={"help": "Kept."})
    kind: str = dataclasses.field(default="a", metadata={"help": "Kind.", "choices": ("a", "b")})
    count: int | None = dataclasses.field(default=None, metadata={"help": "Count."})
    hidden: int = dataclasses.field(default=3, metadata={"help": "Python only.", "flag": False})
    options: dict[str, Any] | str | None = dataclasses.field(default=None, metadata={"help": "Options."})


def parsed(*args: str, file: str | None = None) -> dict[str, Any]:
    command = click.Command("every", params=flags.parameters(Every))
    return flags.settings(command.make_context("every", list(args)), Every, file)[0]


def test_fields_become_flags() -> None:
    assert parsed("--needed", "x") == {"needed": "x"}
    given = parsed("--needed", "x", "--size", "2GiB", "--names", "a,b", "--names", "c", "--numbers", "3", "--loud",
                   "--no-kept", "--kind", "b", "--count", "7", "--options", '{"a": 1}')  # fmt: skip
    assert given == {
        "needed": "x", "size": 2**31, "names": ["a", "b", "c"], "numbers": [3], "loud": True, "kept": False,
        "kind": "b", "count": 7, "options": {"a": 1},
    }  # fmt: skip
    with pytest.raises(click.MissingParameter):
        parsed("--kind", "a")
    for wrong in (["--kind", "c"], ["--count", "many"], ["--hidden", "1"], ["--size", "-1MB"], ["--options", "{"]):
        with pytest.raises(click.UsageError):
            parsed("--needed", "x", *wrong)


def test_a_file_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("needed: from file\nsize: 1MB\nnames: [a, b]\nloud: true\ncount: 3\nnumbers: 4,5\n")
    assert parsed("--count", "9", "--no-loud", file=str(file)) == {
        "needed": "from file", "size": 10**6, "names": ["a", "b"], "loud": False, "count": 9, "numbers": [4, 5],
    }  # fmt: skip
    file.write_text("neded: x\n")
    with pytest.raises(ConfigError, match="'neded'; did you mean 'needed'"):
        parsed(file=str(file))


@pytest.mark.parametrize("count,text", [
    (0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (256e6, "256 MB"), (12_345_678, "12.3 MB"), (20e9, "20 GB"),
    (999_999, "1 MB"), (3.5e12, "3.5 TB"),
])  # fmt: skip
def test_sizes_are_written_as_people_do(count: float, text: str) -> None:
    assert flags.format_size(count) == text


def test_json_has_no_nan() -> None:
    import numpy as np

    made = output.as_json({"a": float("nan"), "b": [np.float32(1.5), np.int64(2)], "c": Path("x"), "d": b"\x01"})
    assert json.loads(made) == {"a": None, "b": [1.5, 2], "c": "x", "d": "01"}


def test_the_usual_training_arguments_are_those_of_transformers() -> None:
    from transformers import TrainingArguments

    theirs = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    hints = typing.get_type_hints(TrainingArguments)
    for name, hint in typing.get_type_hints(flags.UsualTrainingArguments).items():
        kinds = set(typing.get_args(hint)) - {type(None)}
        allowed = set(typing.get_args(hints[name])) or {hints[name]}
        assert name in theirs and kinds <= allowed, name


def test_train_takes_every_training_argument() -> None:
    from predistill.student_train.config import DistillationConfig

    said = invoke("train", "--help-all").stdout
    ours = {"do_train", "do_eval", "do_predict", "local_rank"}  # set by the program, or by torchrun
    only_python = {"parallelism_config"}
    for field in dataclasses.fields(DistillationConfig):
        if field.init and field.name not in ours | only_python:
            assert f"--{field.name.replace('_', '-')}" in said, field.name
