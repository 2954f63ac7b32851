"""Multipliers from moments: closed forms, scipy, sampled laws, and moments that nothing has."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from scipy.optimize import minimize

from kullback.estimate import expectation
from kullback.estimate.multipliers import fit_multipliers


def law(outcomes: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(outcomes, generator=draw, dtype=torch.float64).log_softmax(-1)


@pytest.mark.parametrize("moment", [0.01, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_one_binary_feature_has_a_closed_form(moment: float) -> None:
    """lambda = logit(m) - logit(E_p phi), and p's rate is m: where 1000 steps of 0.05 end 1 short of it."""
    log_p = law(7, 0)
    phi = torch.tensor([0.0, 1, 0, 1, 1, 0, 0], dtype=torch.float64)[:, None]
    rate = expectation(log_p, phi[:, 0])
    (found,) = fit_multipliers(log_p, phi, torch.tensor([moment], dtype=torch.float64))
    wanted = torch.tensor(moment, dtype=torch.float64)
    assert float(found) == pytest.approx(float(torch.logit(wanted) - torch.logit(rate)), rel=1e-5)
    tilted = (log_p + phi @ found[None]).log_softmax(-1)
    assert float(expectation(tilted, phi[:, 0])) == pytest.approx(moment, abs=1e-8)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    features=st.integers(1, 4),
    laws=st.integers(1, 3),
    scale=st.sampled_from([1e-3, 1, 50]),
)
def test_moments_of_a_law_on_the_outcomes_are_met(seed: int, features: int, laws: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    log_p = torch.randn(laws, 9, generator=draw, dtype=torch.float64).log_softmax(-1)
    phi = scale * torch.randn(laws, 9, features, generator=draw, dtype=torch.float64)
    other = torch.randn(laws, 9, generator=draw, dtype=torch.float64).softmax(-1)
    moments = torch.einsum("lo,lof->lf", other, phi).mean(0)
    lam = fit_multipliers(log_p, phi, moments)
    tilted = (log_p + phi @ lam).softmax(-1)
    torch.testing.assert_close(torch.einsum("lo,lof->lf", tilted, phi).mean(0), moments, rtol=1e-6, atol=1e-6 * scale)


def test_scipy_finds_the_same_minimum_of_the_dual() -> None:
    log_p, phi = law(12, 1), torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    moments = law(12, 3).exp() @ phi

    def dual(lam: object) -> float:
        tilt = torch.as_tensor(lam, dtype=torch.float64)
        return float(torch.logsumexp(log_p + phi @ tilt, -1) - tilt @ moments)

    theirs = minimize(dual, [0.0, 0.0, 0.0], method="BFGS", options={"gtol": 1e-9})
    torch.testing.assert_close(fit_multipliers(log_p, phi, moments), torch.as_tensor(theirs.x), rtol=1e-5, atol=1e-5)


def test_a_feature_given_twice_is_no_obstacle() -> None:
    log_p, phi = law(5, 0), torch.arange(5).double()[:, None]
    lam = fit_multipliers(log_p, phi.expand(5, 2), torch.tensor([2.5, 2.5]).double())
    alone = fit_multipliers(log_p, phi, torch.tensor([2.5]).double())
    assert float(lam.sum()) == pytest.approx(float(alone), rel=1e-6)


@pytest.mark.parametrize(
    ("moments", "says"),
    [
        ([1.2, 0.5], r"moments\[0\]=1.2 can be met by nothing"),
        ([1.0, 0.5], r"moments\[0\]=1 can be met only by giving up every outcome .* pointwise"),
        ([0.9, 0.9], r"moments=\[0.9, 0.9\]: nothing can meet them together"),  # phi_1 + phi_2 <= 1 everywhere
        ([0.5 + 1e-6, 0.5], "nothing can meet them together"),
    ],
)
def test_what_nothing_can_meet_is_one_clear_error(moments: list[float], says: str) -> None:
    phi = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match=says):
        fit_multipliers(torch.zeros(3), phi, torch.tensor(moments, dtype=torch.float64))
