"""The fenced blocks of README.md and docs/*.md, and how each kind is run.

| fence                        | what happens                                                                          |
|------------------------------|---------------------------------------------------------------------------------------|
| ```python                    | run; a page is one namespace, in an empty directory                                   |
| ```python title="x.py"       | written to that file; the same for yaml and json                                      |
| ```text title="prints"       | compared with what the block before it printed; `...` stands for anything             |
| ```bash                      | commands, options and keys of `kullback` and targets of `make` are checked; those of  |
|                              | `RUN` are run                                                                         |
| ```yaml                      | checked as a recipe where it has a `method`                                           |
"""

import contextlib
import doctest
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
import yaml
from typer.testing import CliRunner

from kullback.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)?[ ]*(.*?)\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
RUN = ("explain", "methods", "divergences", "papers")
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Block:
    """A fenced block and the line it starts at."""

    language: str
    title: str
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    content = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(content):
        title = re.search(r'title="([^"]+)"', match[2])
        line = content[: match.start()].count("\n") + 1
        found.append(Block(match[1] or "", title[1] if title else "", match[3], line))
    return found


def run_page(page: Path) -> None:
    """Run every block of a page in the current directory."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for block in blocks_of(page):
        where = f"{page.name}:{block.line}"
        if block.title == "prints":
            matches = doctest.OutputChecker().check_output(
                block.text, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            )
            assert matches, f"{where} says\n{block.text}\nbut it printed\n{printed}"
        elif block.title:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            printed = _run_python(block, where, namespace)
        elif block.language == "bash":
            printed = "".join(check_command(words, where) for words in commands_of(block.text))
        if block.language == "yaml":
            check_recipe(block.text, where)


def _run_python(block: Block, where: str, namespace: dict[str, Any]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile("\n" * block.line + block.text, where, "exec"), namespace)
    return out.getvalue()


def commands_of(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def check_command(words: list[str], where: str) -> str:
    """The command and its options exist, and so do the recipe and the keys it sets; what it prints, if it is run."""
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert set(words[1:]) <= targets, f"{where}: make has no {words[1:]}"
    if words[0] != "kullback":
        return ""
    assert words[1] in COMMANDS, f"{where}: kullback has no command {words[1]!r}"
    command = COMMANDS[words[1]]
    known = {option: param for param in command.params for option in param.opts if option.startswith("-")}
    plain, vary, rest = [], [], iter(words[2:])
    for word in rest:
        if not word.startswith("-"):
            plain.append(word)
            continue
        name, _, value = word.partition("=")
        assert name in known, f"{where}: `kullback {words[1]}` has no option {name}"
        if not known[name].is_flag:
            value = value or next(rest)
            vary += [value] if name == "--vary" else []
    if words[1] in ("train", "compare", "explain", "inspect") and not plain[0].startswith("runs/"):
        from kullback.lm.compare import parse_vary
        from kullback.lm.recipe import make_plan, parse_override, read_recipe

        recipe = read_recipe(plain[0]).override(parse_override(text) for text in plain[1:])
        make_plan(recipe)
        for key, values in map(parse_vary, vary):
            for value in values:
                make_plan(recipe.override([(key, value)]))
    if words[1] not in RUN:
        return ""
    result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
    assert result.exit_code == 0, f"{where}: {shlex.join(words)} ended with {result.exit_code}:\n{result.output}"
    return result.stdout


def check_recipe(text: str, where: str) -> None:
    from kullback.lm.recipe import Recipe, make_plan

    values = yaml.safe_load(text)
    if isinstance(values, dict) and "method" in values:
        try:
            make_plan(Recipe("page", values))
        except ValueError as error:
            raise AssertionError(f"{where}: {error}") from error
