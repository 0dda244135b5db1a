"""The commands of docs/converting.md, run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from merge_cases import write
from predistill.cli import cli
from predistill.store.verify import verify

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "converting.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^predistill .*$", "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)), re.MULTILINE)


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stores").mkdir()
    write(tmp_path / "stores" / "monday", {"train": range(20)})
    write(tmp_path / "stores" / "tuesday", {"train": range(40, 50), "validation": range(60, 69)})
    monkeypatch.chdir(tmp_path)
    assert [shlex.split(line)[1] for line in COMMANDS] == ["merge", "drop", "export"]
    for line in COMMANDS:
        done = CliRunner().invoke(cli, shlex.split(line)[1:])
        assert done.exit_code == 0, done.output
    assert verify("stores/both")["ok"]
    train = [n for path in sorted(Path("exported").glob("train-*.parquet"))
             for n in pq.read_table(path)["source_index"].to_pylist()]  # fmt: skip
    assert train == [n for n in range(30) if n not in (2, 5)]
