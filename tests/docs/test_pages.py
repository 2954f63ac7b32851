"""What README.md and docs/ show is run, and what they list is what the code has."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from kullback.divergence import family
from tests.docs import tables
from tests.docs.blocks import PAGES, ROOT, blocks_of, check_command, run_page

PUBLIC = ("kullback", "kullback.divergence", "kullback.lm", "kullback.report")


@pytest.fixture
def _own_family() -> Iterator[None]:
    """Names that a page registers are gone after it."""
    known, others = dict(family._FAMILY), dict(family._ALIASES)
    yield
    for table, before in ((family._FAMILY, known), (family._ALIASES, others)):
        table.clear()
        table.update(before)


@pytest.mark.usefixtures("_own_family")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KULLBACK_PROGRESS", "0")
    run_page(page)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["kullback", "trian", "gkd"], "no command"),
        (["kullback", "train", "gkd", "--fast"], "no option"),
        (["make", "quickly"], "make has no"),
    ],
)
def test_a_command_that_does_not_exist_is_noticed(words: list[str], reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        check_command(words, "here")


def test_a_key_that_does_not_exist_is_noticed() -> None:
    with pytest.raises(ValueError, match=r"signal\.bta"):
        check_command(["kullback", "train", "gkd", "signal.bta=1"], "here")


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_tables_are_what_the_code_says(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == tables.fill(page), "run `python -m tests.docs.tables`"


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_a_place_in_the_reference(module: str) -> None:
    reference = "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "api").glob("*.md")))
    names = [name for name in importlib.import_module(module).__all__ if not name.startswith("__")]
    absent = [name for name in names if not re.search(rf"\b{name}\b", reference)]
    assert not absent, f"docs/api does not mention {absent} of {module}"


def referenced() -> list[tuple[str, str]]:
    """(module, name) of everything that docs/api shows; the name is empty where a whole module is shown."""
    found = []
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for path, members in re.findall(
            r"^::: (\S+)\n(?:    options:\n      members: \[(.*?)\])?", page.read_text(encoding="utf-8"), re.MULTILINE
        ):
            module, _, name = path.rpartition(".")
            if name[0].isupper() or not (ROOT / "src" / Path(*path.split("."))).with_suffix(".py").is_file():
                found.append((module, name))
            else:
                found += [(path, member) for member in members.split(", ")]
    return found


@pytest.mark.parametrize(("module", "name"), referenced())
def test_what_the_reference_shows_is_defined_there(module: str, name: str) -> None:
    """mkdocstrings leaves out, without a word, what it does not find or what a module only imports."""
    loaded = importlib.import_module(module)
    if name:
        assert getattr(loaded, name).__module__ == module


def test_every_page_is_in_the_navigation() -> None:
    text = re.sub(r"!!python\S+", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = set(re.findall(r"[\w/-]+\.md", yaml.safe_dump(yaml.safe_load(text)["nav"])))
    there = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    there = {page for page in there if not page.startswith("papers/")}  # docs/papers.md links them
    assert listed == there


def test_doctests_are_shown_as_code() -> None:
    pytest.importorskip("griffe")
    from docs.docstrings import fence

    text = "Adds.\n\n    >>> 1 + 1\n    2\n\nAnd more."
    assert fence(text) == "Adds.\n\n    ```pycon\n    >>> 1 + 1\n    2\n    ```\n\nAnd more."


def test_the_readme_has_blocks_to_run() -> None:
    """Should the fences stop being found, every test above would pass."""
    languages = [block.language for block in blocks_of(ROOT / "README.md")]
    assert languages.count("python") >= 2
    assert languages.count("bash") >= 1
