"""docs/sharing.md: its commands are understood, its example runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from predistill.cli import cli

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "sharing.md").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
COMMANDS = re.findall(r"^predistill .*$", BLOCKS, re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(line: str) -> None:
    words = shlex.split(line)
    command = cli.get_command(click.Context(cli), words[1])
    assert command is not None
    command.make_context(words[1], words[2:])


def test_the_example_runs(tmp_path: Path) -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
                          env={"PREDISTILL_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)})  # fmt: skip
    said = re.findall(r"^print\(.*# (.*)$", code, re.MULTILINE)
    assert done.stdout.splitlines() == said
