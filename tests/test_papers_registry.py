"""The list of papers: complete, distinct, and honest about what runs."""

import importlib
import re
from pathlib import Path

import pytest

from kullback.papers import PAPERS, find_paper
from kullback.papers.page import head

PAGES = Path(__file__).parents[1] / "docs" / "papers"


def test_all_43_are_there_once():
    assert [paper.number for paper in PAPERS] == list(range(1, 44))
    for field in ("name", "title", "arxiv", "claim"):
        assert len({getattr(paper, field) for paper in PAPERS}) == 43


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)
def test_an_entry_is_well_formed(paper):
    assert re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv)
    assert paper.claim.endswith(".")
    assert len(paper.claim) <= 120
    assert paper.status == ("working" if paper.module else "planned")
    assert paper.command == f"kullback reproduce {paper.number:02d}"


@pytest.mark.parametrize("paper", [paper for paper in PAPERS if paper.module], ids=lambda paper: paper.name)
def test_a_working_paper_has_what_the_command_needs_and_a_page_that_names_it(paper):
    assert callable(importlib.import_module(paper.module).reproduce)
    page = PAGES / f"{paper.number:02d}-{paper.slug}.md"
    if page.exists():
        assert page.read_text().startswith("\n\n".join(head(paper)))


def test_papers_are_found_by_number_and_name():
    assert find_paper("5") == find_paper("05") == find_paper(5) == find_paper("vopd")
    with pytest.raises(ValueError, match="numbered 1 to 43"):
        find_paper("44")
    with pytest.raises(ValueError, match="did you mean vOPD"):
        find_paper("vopdd")
