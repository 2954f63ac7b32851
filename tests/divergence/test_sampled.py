"""Values and gradients from samples, by enumerating every sample: unbiased means exactly equal."""

import pytest
import torch

from kullback.divergence import divergence

from .table import SMOOTH, TABLE


def problem(seed=0, n=7):
    generator = torch.Generator().manual_seed(seed)
    t, m = (torch.randn(n, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    return t, m, t.log_softmax(-1), m.log_softmax(-1)


@pytest.mark.parametrize("estimator", ["centred", "plain", "k1", "k3"])
@pytest.mark.parametrize("drawn_from", ["model", "target"])
@pytest.mark.parametrize("name", TABLE)
def test_values_are_unbiased(name, drawn_from, estimator):
    D, (t, m, lt, lm) = TABLE[name], problem()
    weights = (lm if drawn_from == "model" else lt).exp()
    value = D.sampled(lt, lm, drawn_from=drawn_from, estimator=estimator)
    assert not value.requires_grad
    torch.testing.assert_close((weights * value).sum(), D.categorical(t, m), rtol=1e-8, atol=1e-10)
    if estimator in ("centred", "k3"):
        assert (value >= 0).all()


def test_k1_k2_k3_by_name():
    """Schulman's three, for both KLs; k2 is biased."""
    t, m, lt, lm = problem()
    x = (lt - lm).detach()
    reverse, forward = divergence("reverse_kl"), divergence("forward_kl")
    torch.testing.assert_close(reverse.sampled(lt, lm, estimator="k1"), -x)
    torch.testing.assert_close(reverse.sampled(lt, lm, estimator="k2"), x**2 / 2)
    torch.testing.assert_close(reverse.sampled(lt, lm, estimator="k3"), x.exp() - 1 - x)
    torch.testing.assert_close(forward.sampled(lt, lm, drawn_from="target", estimator="k1"), x)
    torch.testing.assert_close(forward.sampled(lt, lm, drawn_from="target", estimator="k3"), (-x).exp() - 1 + x)
    torch.testing.assert_close(forward.sampled(lt, lm, estimator="k1"), x.exp() * x)
    bias = (lm.exp() * reverse.sampled(lt, lm, estimator="k2")).sum() - reverse.categorical(t, m)
    assert abs(bias) > 0.01
    far = torch.tensor([-300.0, 30.0, 300.0])  # k1 keeps its digits where u itself is lost
    torch.testing.assert_close(reverse.sampled(far, torch.zeros(3), estimator="k1"), -far)


@pytest.mark.parametrize("name", SMOOTH)
def test_k2_is_right_to_second_order(name):
    D = TABLE[name]
    t, _, lt, _ = problem()
    noise = torch.linspace(-1, 1, 7, dtype=torch.float64)
    for step, relative in ((1e-2, 0.05), (1e-3, 0.005)):
        lm = (t + step * noise).log_softmax(-1)
        k2 = (lm.exp() * D.sampled(lt, lm, estimator="k2")).sum()
        assert k2.item() == pytest.approx(D.from_log_probs(lt, lm).item(), rel=relative)


def test_the_error_falls_with_the_root_of_n():
    """Monte Carlo: the slope of log error against log n is -1/2."""
    t, m, lt, lm = problem(3, n=20)
    D = divergence("unit(jsd(0.1))")
    exact = D.categorical(t, m).item()
    generator = torch.Generator().manual_seed(0)
    errors = []
    sizes = (50, 500, 5000)
    for n in sizes:
        ids = torch.multinomial(lm.exp().detach(), 200 * n, replacement=True, generator=generator).view(200, n)
        errors.append((D.sampled(lt[ids], lm[ids]).mean(1) - exact).square().mean().sqrt().log().item())
    slope = (errors[-1] - errors[0]) / (torch.tensor(sizes[-1] / sizes[0]).log().item())
    assert slope == pytest.approx(-0.5, abs=0.06)


@pytest.mark.parametrize(
    ("drawn_from", "route"), [("model", "link"), ("model", "squared"), ("target", "value"), ("target", "link")]
)
@pytest.mark.parametrize("name", TABLE)
def test_the_gradient_of_a_surrogate_is_unbiased(name, drawn_from, route):
    """Summed over all samples with their probabilities, detached as a sampler's are: the gradient of D, both sides."""
    D, (t, m, lt, lm) = TABLE[name], problem(1)
    expected = torch.autograd.grad(D.categorical(t, m, target_grad=True), (t, m))
    weights = (lm if drawn_from == "model" else lt).exp().detach()
    options = {"route": route, "drawn_from": drawn_from}
    loss = (weights * D.surrogate(lt, lm, **options)).sum()
    gradient, nothing = torch.autograd.grad(loss, (m, t), allow_unused=True, retain_graph=True)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-6, atol=1e-9)
    assert nothing is None
    loss = (weights * D.surrogate(lt, lm, target_grad=True, **options)).sum()
    for a, b in zip(torch.autograd.grad(loss, (t, m)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", TABLE)
def test_a_baseline_changes_the_variance_only(name):
    D, (t, m, lt, lm) = TABLE[name], problem(2)
    expected = torch.autograd.grad(D.categorical(t, m), m)[0]
    exact_baseline = D.expected_link(t, m).expand(7)
    for baseline in (0.7, exact_baseline, exact_baseline.clone().requires_grad_()):
        loss = (lm.exp().detach() * D.surrogate(lt, lm, baseline=baseline)).sum()
        gradient = torch.autograd.grad(loss, m, retain_graph=True)[0]
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", TABLE)
def test_squared_is_the_integral_of_the_link(name):
    """s(l) with ds / d log model = g: its value, by numeric differentiation."""
    D = TABLE[name]
    x = torch.tensor([-30.0, -7.0, -1.0, -0.1, 0.2, 0.9, 5.0, 20.0], dtype=torch.float64)
    lm = torch.full_like(x, -3.0)
    step = 1e-3

    def s(x):
        return D.surrogate(x + lm, lm, route="squared")

    slope = -(s(x + step) - s(x - step)) / (2 * step)
    torch.testing.assert_close(slope, D.link(x), rtol=1e-5, atol=1e-6)
    assert s(torch.zeros_like(x)).abs().max() == 0


def test_squared_is_k2_for_reverse_kl_and_k3_for_forward_kl():
    x = torch.tensor([-2.0, 0.3, 4.0], dtype=torch.float64)
    zero = torch.zeros_like(x)
    torch.testing.assert_close(divergence("reverse_kl").surrogate(x, zero, route="squared"), x**2 / 2)
    torch.testing.assert_close(divergence("forward_kl").surrogate(x, zero, route="squared"), x.exp() - 1 - x)


def test_the_value_as_a_loss_is_wrong_and_refused():
    """Why: k1 has expected gradient zero, k3 forward KL's, plain Hellinger's points the other way (by enumeration)."""
    t, m, lt, lm = problem(4)
    p = lm.exp().detach()
    x = lt.detach() - lm

    def gradient(loss):
        return torch.autograd.grad((p * loss).sum(), m, retain_graph=True)[0]

    def true(name):
        return torch.autograd.grad(divergence(name).categorical(t, m), m)[0]

    assert gradient(-x).abs().max() < 1e-15
    torch.testing.assert_close(gradient(x.exp() - 1 - x), true("forward_kl"))
    assert torch.cosine_similarity(gradient(1 - (x / 2).exp()), true("hellinger"), dim=0) < 0
    for D in TABLE.values():
        with pytest.raises(ValueError, match=r'route="value": on samples of the model .* use route="link"'):
            D.surrogate(lt, lm, route="value")


def test_other_refusals():
    _, _, lt, lm = problem()
    D = divergence("tv")
    for options, says in (
        ({"route": "squared", "drawn_from": "target"}, "drawn from the target"),
        ({"drawn_from": "target", "baseline": 1.0}, "baseline"),
        ({"route": "squared", "baseline": 1.0}, "baseline"),
        ({"route": "pathwise"}, "choose one of link, squared, value"),
        ({"drawn_from": "student"}, "choose one of model, target"),
    ):
        with pytest.raises(ValueError, match=says):
            D.surrogate(lt, lm, **options)
    with pytest.raises(ValueError, match="choose one of centred"):
        D.sampled(lt, lm, estimator="k4")
    with pytest.raises(ValueError, match="no second derivative"):
        D.sampled(lt, lm, estimator="k2")


@pytest.mark.parametrize("name", TABLE)
def test_impossible_samples_give_no_nan(name):
    D = TABLE[name]
    t, m = torch.tensor([-torch.inf, -1.0, -1e4]), torch.tensor([-1.0, -torch.inf, -2.0])
    for drawn_from in ("model", "target"):
        for estimator in ("centred", "plain"):
            assert not D.sampled(t, m, drawn_from=drawn_from, estimator=estimator).isnan().any()
