"""Card 06: the exact fixed points with the card's numbers, and a quick run of the whole page."""

import pytest
import torch

from kullback.diffusion import two_modes
from kullback.diffusion.exact import fixed_points
from kullback.papers import p06_f_distill as paper

FROM_THE_LEFT = {  # (a, b) of the card, from (1, -1)
    "reverse KL": (0.532, -1.949),
    "softened": (0.518, -1.966),
    "Jeffreys": (1.695, -0.730),
    "Hellinger": (1.827, -0.796),
    "JS": (1.861, -0.811),
    "forward KL": (1.900, -0.800),
}


@pytest.fixture(scope="module")
def exact():
    found = fixed_points([*paper.PAPER.values()], paper.STARTS, two_modes(), torch.tensor(paper.VARIANCES))
    return dict(zip(paper.PAPER, found.tolist(), strict=True))


@pytest.mark.parametrize("name", FROM_THE_LEFT)
def test_fixed_points_of_the_card(exact, name):
    assert exact[name][0] == pytest.approx(FROM_THE_LEFT[name], abs=0.004)


def test_starts_matter(exact):
    assert exact["softened"][1] == pytest.approx((0.540, 1.916), abs=0.004)
    assert exact["reverse KL"][2] == pytest.approx((0.590, 1.860), abs=0.004)
    assert exact["JS"][3] == pytest.approx((0.566, -1.917), abs=0.004)
    for name in ("Jeffreys", "forward KL"):
        assert exact[name][3] == pytest.approx(FROM_THE_LEFT[name], abs=0.004)


def test_the_gradient_holds_for_the_whole_family():
    assert max(paper.gradient_errors().values()) < 1e-6


def test_quick_run_writes_page_and_figure(tmp_path, monkeypatch):
    monkeypatch.setenv("KULLBACK_PROGRESS", "0")
    result = paper.reproduce(quick=True, docs=tmp_path)
    text = result.page.read_text()
    assert result.page.name == "06-f-distill.md"
    assert "kullback reproduce 06 --quick" in text
    assert result.figures[0].stat().st_size < 300_000
    assert result.directions[0].held is True
