"""What the house looks like: who imports whom, what is public, what is light, what the pages say."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import predistill
import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "store": {"store"}, "teacher_dump": {"teacher_dump", "store"}, "student_train": {"student_train", "store"},
    "report_page": {"report_page", "store"},
}  # fmt: skip
HEAVY = {"torch", "transformers", "datasets", "pyarrow", "duckdb", "numpy", "pandas", "rich", "yaml"}
LONGEST_FILE = 400  # lines
LONGEST_FUNCTION = 60  # lines


def package_files() -> list[Path]:
    """Every module that is installed."""
    rooms = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    return sorted([*ROOT.glob("*.py"), *rooms])


def imported_rooms(path: Path) -> Iterator[str]:
    """First names below `predistill` that a file imports, relatively or not, wherever in the file."""
    depth = len(path.relative_to(ROOT).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("predistill"):
            yield (node.module or "").partition(".")[2].split(".")[0] or node.names[0].name
        elif isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("predistill"))


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        wrong = set(imported_rooms(path)) - ROOMS[room]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_public_names_are_one_list() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        alias.name
        for block in tree.body if isinstance(block, ast.If)
        for node in block.body if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }  # fmt: skip
    assert predistill.__all__ == sorted(predistill.__all__)
    assert set(predistill.__all__) == {*typed, "__version__"}
    assert set(predistill.__all__) <= set(dir(predistill))
    for name in predistill.__all__:
        assert getattr(predistill, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = predistill.nothing


def test_every_error_is_public_and_has_one_base() -> None:
    from predistill.store import errors

    tree = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert tree <= set(predistill.__all__)
    assert all(issubclass(getattr(errors, name), predistill.PredistillError) for name in tree)


def run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    return done.stdout


@pytest.mark.parametrize("words", [[], ["dump"], ["train"], ["query"]])
def test_help_is_light(words: list[str], tmp_path: Path) -> None:
    script = (
        "import sys, predistill\nfrom predistill.cli import cli\n"
        f"try: cli({[*words, '--help']!r}, prog_name='predistill')\n"
        f"finally: print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stderr.strip() == "[]"
    assert "Example:" in done.stdout


def test_help_is_quick() -> None:
    """Processor time, which other programs on the machine do not change; the best of three."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(sys.executable, "-m", "predistill", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.3  # seconds


def test_the_folder_may_have_any_name(tmp_path: Path) -> None:
    """`python cli.py` runs the code beside it, not an installed predistill."""
    clone = tmp_path / "my clone-2 (of 3)"
    for path in package_files():
        there = clone / path.relative_to(ROOT)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, there)
    text = (clone / "__init__.py").read_text(encoding="utf-8")
    (clone / "__init__.py").write_text(text.replace(predistill.__version__, "98.7.6"), encoding="utf-8")
    assert "98.7.6" in run(sys.executable, str(clone / "cli.py"), "--version", cwd=tmp_path)
    assert "98.7.6" in run(sys.executable, "cli.py", "--version", cwd=clone)
    assert "Example:" in run(sys.executable, "cli.py", "train", "--help", cwd=clone)


def test_three_ways_in_are_one_program() -> None:
    ways = [[sys.executable, "-m", "predistill"], [sys.executable, str(ROOT / "cli.py")]]
    if script := shutil.which("predistill", path=os.path.dirname(sys.executable)):
        ways.append([script])
    assert len({run(*way, "--help") for way in ways}) == 1


def test_packaging_lists_every_package_and_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {
        ".".join(["predistill", *path.parent.relative_to(ROOT).parts])
        for path in package_files() if path.name == "__init__.py"
    }  # fmt: skip
    assert listed == found
    assert "version" in project["project"]["dynamic"]
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    wanted = [re.split(r"[<>=\[;]", name)[0].lower().replace("_", "-") for name in project["project"]["dependencies"]]
    assert set(wanted) <= pinned


@pytest.mark.parametrize("path", package_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    assert path.stem not in {"utils", "helpers", "common"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines"


def test_nothing_is_unpickled() -> None:
    for path in package_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {"pickle", "dill", "marshal", "shelve"}, path


# ---- pages ----


def test_cli_page_is_what_help_says() -> None:
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    assert spec and spec.loader
    make_cli = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_cli)
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == make_cli.page(), "run `make docs`"


def commands_in(page: str) -> list[list[str]]:
    """The words of every `predistill …` line in the page's code blocks; a backslash goes on."""
    blocks = re.findall(r"```(?:sh|bash|console)?\n(.*?)```", page, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line.strip(), comments=True) for line in lines if line.strip().startswith("predistill ")]


def parse(words: list[str]) -> None:
    """Raises click.UsageError for a command or flag that there is not."""
    from predistill.cli import cli

    command = cli.get_command(click.Context(cli), words[1])
    assert command is not None, f"there is no command {words[1]}"
    command.make_context(words[1], words[2:])


def test_commands_in_the_readme_are_understood() -> None:
    found = commands_in((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {words[1] for words in found} >= {"dump", "train", "info", "query", "verify"}
    for words in found:
        parse(words)


def test_every_example_is_understood() -> None:
    from predistill.cli import cli

    for name, command in cli.commands.items():
        example = (command.epilog or "").partition("Example:")[2]
        found = commands_in(f"```\n{example}\n```")
        assert found, f"{name} has no example"
        for words in found:
            parse(words)


def test_the_map_names_every_file_of_every_folder_and_no_other() -> None:
    page = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    mapped: dict[str, set[str]] = {}
    for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        folder = re.match(r"`([^`]+)/`", part)
        mapped[folder[1] if folder else "."] = set(re.findall(r"^\| `([^`]+\.py)` \| \S", part, re.MULTILINE))
    there: dict[str, set[str]] = {}
    for path in package_files():
        if path.name != "__init__.py":
            there.setdefault(path.parent.relative_to(ROOT).as_posix(), set()).add(path.name)
    assert mapped == there


def test_make_targets_are_those_that_the_readme_names() -> None:
    page, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile"))
    for target in set(re.findall(r"`?make ([a-z]+)", page)) - {"it"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().endswith("make test")
