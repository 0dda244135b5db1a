"""Write docs/cli.md from --help: `make docs`. A test holds the page against the program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WIDTH = 100  # characters
PAGE = Path(__file__).with_name("cli.md")


def page() -> str:
    """The whole page: one section a command."""
    from predistill.cli import cli

    parts = ["# The command line\n\nMade by `make docs` from `--help`.\n"]
    width: dict[str, Any] = {"terminal_width": WIDTH, "max_content_width": WIDTH, "resilient_parsing": True}
    top = cli.make_context("predistill", [], **width)
    parts.append(_section("predistill", cli.get_help(top)))
    for name, command in cli.commands.items():
        below = command.make_context(name, [], parent=top, **width)
        parts.append(_section(f"predistill {name}", command.get_help(below)))
    return "\n".join(parts)


def _section(title: str, text: str) -> str:
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return f"## {title}\n\n```\n{lines}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
