"""Cards 02, 04 and 23: ends of the curves, zeros of a target, weights far from one, and what changes a coefficient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kullback.divergence import divergence
from kullback.lm.advantages import divergence_cost, group_advantage
from kullback.lm.distances import forward_kl, to_target
from kullback.lm.rehearse import rehearse
from kullback.theory import tabular
from kullback.theory.posterior import evidence_bound, log_evidence, posterior, resample
from tests.lm.small import make
from tests.lm.test_dph_rl import CARD, term_of
from tests.lm.test_trace import clipped

# Card 02

GENERATORS = {  # f(t), t = model / p, f'(inf), and f' where p is 0 less f'(1)
    "forward_kl": (lambda t: -t.log(), 0.0, 1.0),
    "tv": (lambda t: (t - 1).abs() / 2, 0.5, 0.5),
    "2*jsd(0.5)": (lambda t: t * (2 * t / (t + 1)).log() + (2 / (t + 1)).log(), math.log(2), math.log(2)),
    "2*alpha(2)": (lambda t: (t - 1) ** 2 / t, 1.0, 1.0),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_with_zeros_in_the_target_their_mass_keeps_the_theorem_exact(name: str) -> None:
    """Checks 8 and 10: finite differences of sum p f(model / p) + f'(inf) model({p = 0}), f as the card writes it."""
    f, at_infinity, link = GENERATORS[name]
    D = divergence(name)
    assert D.link_at_zero == pytest.approx(link)
    draw = torch.Generator().manual_seed(7)
    logits = torch.randn(6, generator=draw, dtype=torch.float64)
    p = torch.tensor([0.3, 0.0, 0.2, 0.4, 0.0, 0.1], dtype=torch.float64)

    def value(x: torch.Tensor) -> torch.Tensor:
        m = x.softmax(-1)
        return (p[p > 0] * f(m[p > 0] / p[p > 0])).sum() + at_infinity * m[p == 0].sum()

    eye, step = torch.eye(6, dtype=torch.float64), 1e-5
    finite = torch.stack([(value(logits + step * e) - value(logits - step * e)) / (2 * step) for e in eye])
    policy = logits.log_softmax(-1)
    torch.testing.assert_close(tabular.score_gradient(policy, D.link(p.log() - policy)), finite, rtol=1e-7, atol=3e-9)
    assert float(D.from_log_probs(p.log(), policy)) == pytest.approx(float(value(logits)), rel=1e-10)
    assert not D.link(torch.tensor([-torch.inf])).isnan()


@pytest.mark.parametrize("name", ["reverse_kl", "2*alpha(-1)"])
def test_two_divergences_are_infinite_where_the_target_is_zero(name: str) -> None:
    assert divergence(name).link_at_zero == math.inf


def test_pseudo_rewards_are_bounded_as_the_card_says() -> None:
    """Pitfall e, of -link: KL's and JS's have no upper bound, JS's a lower one of -log 2, TV's both."""
    rare, common = torch.tensor([60.0, -60.0], dtype=torch.float64)  # log p / model
    kl, js, tv = (divergence(name) for name in ("forward_kl", "2*jsd(0.5)", "tv"))
    assert float(-kl.link(rare)) == pytest.approx(math.exp(60), rel=1e-9)  # p / model
    assert float(-js.link(rare)) == pytest.approx(60 - math.log(2), rel=1e-9)  # like -log t
    assert float(-js.link(common)) == pytest.approx(-math.log(2), rel=1e-9)
    assert (float(-tv.link(rare)), float(-tv.link(common))) == (0.5, -0.5)


def test_kl_to_data_is_maximum_likelihood() -> None:
    """Check 3: with the data's own frequencies as target the gradient is that of their mean negative log-likelihood."""
    data = torch.tensor([0, 0, 3, 1, 3, 3, 0, 3])
    empirical = torch.bincount(data, minlength=5).double() / len(data)
    logits = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    policy = logits.log_softmax(-1)
    (nll,) = torch.autograd.grad(-policy[data].mean(), logits)
    pseudo = divergence("forward_kl").link(empirical.log() - policy.detach())
    torch.testing.assert_close(tabular.score_gradient(policy.detach(), pseudo), nll)


def test_estimates_of_distance_where_the_target_has_zeros() -> None:
    """Terms with P = 0 count 0 in forward KL and their whole mass in TV; means under a proposal, by enumeration."""
    p = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0], dtype=torch.float64)
    model, s = (
        torch.randn(5, generator=torch.Generator().manual_seed(k), dtype=torch.float64).log_softmax(-1) for k in (1, 2)
    )
    kept = p > 0
    kl = float((p[kept] * (p[kept].log() - model[kept])).sum())
    assert float((s.exp() * forward_kl(p.log(), model, s)).sum()) == pytest.approx(kl)
    D = divergence("2*jsd(0.5)")
    found = {k: float((s.exp() * v).sum()) for k, v in to_target(D, p.log(), model, s, p_can_be_zero=True).items()}
    m = (p + model.exp()) / 2
    jsd = (p[kept] * (p[kept] / m[kept]).log()).sum() + (model.exp() * (model.exp() / m).log()).sum()
    assert found["target_forward_kl"] == pytest.approx(kl)
    assert found["target_tv"] == pytest.approx(float((p - model.exp()).abs().sum()) / 2)
    assert found["divergence"] == pytest.approx(float(jsd))
    assert "target_reverse_kl" not in found


# Card 04


@pytest.mark.parametrize(
    ("which", "slope"), [("forward_kl", 1), ("2*jsd(0.5)", math.log(2)), ("alpha(0.2)", 5), ("alpha(0.5)", 2)]
)
def test_a_token_the_student_made_much_likelier_pulls_in_proportion(which: str, slope: float) -> None:
    """Value and weight of one sample grow linearly in the ratio, with slopes 1, log 2 and 1 / alpha."""
    writer = torch.tensor([1e-9], dtype=torch.float64)
    for ratio in (1e7, 1e8):
        term, pull = term_of(which, writer * ratio, writer)
        assert float(term.value.detach()) / ratio == pytest.approx(slope, rel=0.06)
        assert float(pull) / ratio == pytest.approx(slope, rel=0.06)


def test_the_part_that_the_definition_form_would_replay() -> None:
    """The card's last golden number, KL(writer || mixture), is a skewed forward KL."""
    p, q = (torch.tensor(one, dtype=torch.float64) for one in ([0.7, 0.2, 0.1], [0.2, 0.3, 0.5]))
    term, _ = term_of("skew_kl(0.5)", p, q)
    assert float((q * term.value[0].detach()).sum()) == pytest.approx(0.147923, abs=1e-6)


def test_beyond_the_papers_range_alpha_is_still_its_formula() -> None:
    """The paper allows 0 < alpha < 1; here any: the generator and its limits are the same."""
    v = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)
    for a in (-0.5, 1.5, 2.0):
        value = (v ** (1 - a) - (1 - a) * v - a) / (a * (a - 1))
        writer = torch.full((3,), 0.2, dtype=torch.float64)
        torch.testing.assert_close(term_of(f"alpha({a})", writer * v, writer)[0].value[0].detach(), value)


@pytest.mark.parametrize("which", ["2*jsd(0.5)", "alpha(0.2)", "alpha(0.8)"])
def test_only_forward_kl_sums_to_the_divergence_of_completions(which: str) -> None:
    draw = torch.Generator().manual_seed(0)
    (p1, q1), (p2, q2) = (
        torch.randn(2, *shape, generator=draw, dtype=torch.float64).softmax(-1) for shape in ((3,), (3, 3))
    )
    summed = {"forward_kl": 0.0, which: 0.0}
    for name in summed:
        for a in range(3):
            for b in range(3):
                row = term_of(name, torch.stack([p1[a], p2[a, b]]), torch.stack([q1[a], q2[a, b]]))[0].value
                summed[name] += float(q1[a] * q2[a, b] * row.detach().sum())
    p, q = (p1[:, None] * p2).flatten(), (q1[:, None] * q2).flatten()
    v = p / q
    assert summed["forward_kl"] == pytest.approx(float((q * CARD["forward_kl"](v)).sum()), abs=1e-12)
    assert abs(summed[which] - float((q * CARD[which](v)).sum())) > 1e-3


# Card 16


def test_a_clipped_divergence_is_not_least_at_equality() -> None:
    """Check 7: negative terms are kept, so p = q, at 0, lies above another p; unclipped it is the least."""
    q = torch.tensor([0.9, 0.1], dtype=torch.float64).log()
    others = [torch.tensor([x, 1 - x], dtype=torch.float64).log() for x in (0.01, 0.3, 0.6, 0.95)]
    for limit, below in ((0.05, True), (1e9, False)):
        assert float(clipped(divergence("forward_kl"), q, q, limit)[0]) == pytest.approx(0, abs=1e-12)
        values = [float(clipped(divergence("forward_kl"), q, p, limit)[0]) for p in others]
        assert (min(values) < -0.1) == below
        assert (min(values) > 0) != below


# Card 23


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), beta=st.floats(0.05, 10), shift=st.floats(-20, 20))
def test_a_constant_reward_is_added_to_the_objective(seed: int, beta: float, shift: float) -> None:
    """Check 5: c to J and c / beta to log Z; the target stays."""
    prior, policy = tabular.random_policy(7, 2, seed=seed)
    r = torch.randn(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    J = beta * (evidence_bound(policy, prior, r + shift, beta) - evidence_bound(policy, prior, r, beta))
    assert float(J) == pytest.approx(shift, rel=1e-9, abs=1e-9)
    up = log_evidence(prior, r + shift, beta) - log_evidence(prior, r, beta)
    assert float(up) == pytest.approx(shift / beta, rel=1e-9, abs=1e-9)
    torch.testing.assert_close(posterior(prior, r + shift, beta), posterior(prior, r, beta), rtol=1e-9, atol=1e-9)


def test_costs_of_tokens_add_up_to_the_sequence_s_penalty() -> None:
    """Check 6, in the reward that methods use: for reverse KL the tokens' links sum to that of the sequence."""
    draw = torch.Generator().manual_seed(0)
    prior, model = torch.randn(2, 5, 8, generator=draw, dtype=torch.float64) - 3
    scored = torch.rand(5, 8, generator=draw) < 0.7
    whole = torch.where(scored, model - prior, 0.0).sum(1)
    for name in ("reverse_kl", "forward_kl"):
        tokens = divergence_cost(divergence(name), prior, model, scored)
        sequence = divergence_cost(divergence(name), prior, model, scored, horizon="whole")
        per_row = torch.where(scored, sequence, torch.nan).nanmean(1)
        assert torch.allclose(tokens.sum(1), per_row, atol=1e-12) == (name == "reverse_kl")
    torch.testing.assert_close(divergence_cost(divergence("reverse_kl"), prior, model, scored).sum(1), whole)


@pytest.mark.parametrize("aggregate", ["token", "row", "row_sum"])
@pytest.mark.parametrize("form", ["loss", "ratio", "exact"])
def test_reward_and_penalty_are_averaged_alike(aggregate: str, form: str) -> None:
    """A penalty per token beside a reward per sequence would be another beta: both are averaged in one way."""
    terms = rehearse(make("grpo", penalty=0.3, form=form, aggregate=aggregate, horizon="token"))
    surrogate, penalty = terms
    assert penalty.name == "penalty"
    assert surrogate.mean == penalty.mean
    assert penalty.coefficient == pytest.approx(0.3 * surrogate.coefficient)


def test_whitening_rewards_changes_beta() -> None:
    """Twice the reward is twice the advantage, and so half of beta, only where nothing is divided by its deviation."""
    reward, group = torch.tensor([1.0, 0.0, 0.5, 0.2], dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    for scale, factor in (("none", 2.0), ("group", 1.0), ("batch", 1.0)):
        one, two = (group_advantage(k * reward, group, scale=scale, epsilon=0.0) for k in (1, 2))  # type: ignore[arg-type]
        torch.testing.assert_close(two, factor * one)


def test_weights_of_the_posterior_do_not_overflow() -> None:
    """exp(r / beta) of 1e6 nats: subtracted in log space, the best of equal chance is drawn."""
    prior = torch.full((4,), -math.log(4), dtype=torch.float64)
    r = torch.tensor([0.0, 999.0, 1000.0, -1000.0], dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    assert (resample(prior, r, 1e-3, 500, 100, generator=draw) == 2).all()
    assert posterior(prior, r, 1e-3).exp().tolist() == pytest.approx([0, 0, 1, 0], abs=1e-9)
    assert float(log_evidence(prior, r, 1e-3)) == pytest.approx(1e6 - math.log(4), rel=1e-14)
