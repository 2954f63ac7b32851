"""What installing and importing kullback costs, and that its metadata agree."""

import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import kullback

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HEAVY = ("transformers", "datasets", "accelerate", "peft", "matplotlib", "plotly", "reasoning_gym", "pandas", "trl")
ALLOWED = 0.5  # seconds beyond importing torch


def python(code: str) -> str:
    """What a fresh interpreter prints that finds kullback as this one does."""
    source = str(Path(kullback.__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {source!r}); {code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def extra_seconds() -> float:
    """CPU seconds that `import kullback` adds where torch is loaded: what other processes do hardly changes them."""
    measure = "import time, torch; a = time.process_time(); import kullback; print(time.process_time() - a)"
    return statistics.median(float(python(measure)) for _ in range(3))


def test_importing_kullback_costs_little_more_than_torch() -> None:
    seconds = extra_seconds()
    print(f"import kullback: {seconds:.3f} s more than import torch")
    assert seconds <= ALLOWED


def test_heavy_modules_wait_until_they_are_needed() -> None:
    loaded = python("import kullback; print(*{name.partition('.')[0] for name in sys.modules})").split()
    assert "kullback" in loaded
    assert not set(HEAVY) & set(loaded)


def test_one_version() -> None:
    assert PROJECT["version"] == kullback.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changes, re.MULTILINE)[1] == kullback.__version__  # type: ignore[index]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (\S+)", citation, re.MULTILINE)[1] == kullback.__version__  # type: ignore[index]


def test_extras_that_are_named_exist() -> None:
    """In the pages, in error messages and in the Makefile."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "src").rglob("*.py")]
    named = {
        extra
        for page in pages
        for group in re.findall(r"(?:kullback|\.)\[([a-z, ]+)\]", page.read_text(encoding="utf-8"))
        for extra in group.replace(" ", "").split(",")
    }
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for group in re.findall(r"^EXTRAS_\w+ := (\S+)", makefile, re.MULTILINE):
        named |= set(group.split(","))
    assert named, "no page names an extra any more: is the pattern right?"
    assert named <= set(PROJECT["optional-dependencies"])


def test_the_licence_is_the_apache_one() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert len(text.splitlines()) == 201
    assert "Version 2.0, January 2004" in text


def test_what_the_package_needs_at_run_time_is_declared_as_data() -> None:
    """Every file below src/kullback that is not Python is matched by a pattern of package-data."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["kullback"]
    package = ROOT / "src" / "kullback"
    declared = {path for pattern in patterns for path in package.glob(pattern)}
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    undeclared = sorted(
        str(path.relative_to(package)) for path in files if path.suffix not in (".py", ".pyc") and path not in declared
    )
    assert not undeclared
    assert (package / "py.typed") in declared
