"""Unnormalised targets: what they say, what they are, and how they are read."""

import math

import pytest
import torch

from kullback.lm.energies import distributional, energy, mixture, pointwise, posterior, product

REFERENCE = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
GRADES = {
    "accuracy": torch.tensor([1.0, 0.0, 1.0, 0.0]),
    "score": torch.tensor([0.5, -1.0, 2.0, 0.0]),
    "finished": torch.tensor([1.0, 1.0, 0.0, 0.0]),
}


def test_a_posterior_is_the_exponential_tilt() -> None:
    torch.testing.assert_close(
        posterior("score", beta=0.3).log_score(REFERENCE, GRADES), REFERENCE + GRADES["score"].double() / 0.3
    )


def test_a_pointwise_constraint_is_conditioning() -> None:
    target = pointwise().log_score(REFERENCE, GRADES)
    torch.testing.assert_close(target.softmax(-1), torch.tensor([0.25, 0.0, 0.75, 0.0], dtype=torch.float64))
    assert pointwise().can_be_zero
    smooth = pointwise(floor=-3.0)
    assert not smooth.can_be_zero
    torch.testing.assert_close(smooth.factor(GRADES, {}), torch.tensor([0.0, -3.0, 0.0, -3.0], dtype=torch.float64))


def test_products_add_and_mixtures_add_what_is_not_logarithmic() -> None:
    a, b = posterior("score", beta=2.0), pointwise("finished")
    torch.testing.assert_close((a * b).factor(GRADES, {}), a.factor(GRADES, {}) + b.factor(GRADES, {}))
    mixed = mixture(a, b, shares=[0.2, 3.0])
    torch.testing.assert_close(
        mixed.factor(GRADES, {}).exp(), 0.2 * a.factor(GRADES, {}).exp() + 3.0 * b.factor(GRADES, {}).exp()
    )
    assert (a * b).can_be_zero
    assert not mixed.can_be_zero
    assert mixture(b, pointwise()).can_be_zero
    assert (a * b * a).grades == ("score", "finished")


def test_multipliers_tilt_their_grades() -> None:
    target = distributional(accuracy=0.6, finished=0.2)
    assert target.moments == {"accuracy": 0.6, "finished": 0.2}
    found = target.factor(GRADES, {"accuracy": 2.0, "finished": -1.0})
    assert found.tolist() == [1.0, -1.0, 2.0, 0.0]
    assert (pointwise() * target).moments == target.moments


def test_unknown_grades_are_unknown_scores() -> None:
    grades = {"accuracy": torch.tensor([1.0, math.nan])}
    for target in (pointwise(), posterior(beta=1.0), pointwise() * posterior(beta=1.0)):
        assert target.factor(grades, {}).isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    "text",
    [
        "posterior(accuracy, beta=0.1)",
        "pointwise(finished, floor=-8)",
        "pointwise(accuracy) * posterior(score, beta=2) * distributional(finished=0.9)",
        "mixture(posterior(accuracy, beta=0.5), pointwise(finished), shares=[0.3, 0.7])",
    ],
)
def test_what_is_written_is_read_back(text: str) -> None:
    target = energy(text)
    assert str(target) == text
    assert energy(str(target)) == target
    assert energy(target) is target
    assert target.says


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("posterior(accuracy", r"target\.score=.* is not understood .* write posterior"),
        ("best(accuracy)", r"best\(accuracy\) is no target"),
        ("pointwise('accuracy')", "is no name of a grade"),
        ("posterior(accuracy)", "missing .* 'beta'"),
        ("posterior(accuracy, beta=0)", "beta must be positive"),
        ("pointwise(accuracy, floor=2)", "a negative number of nats"),
        ("distributional()", "asks for nothing"),
        ("mixture(pointwise(a), shares=[1, 2])", r"1 targets with shares=\[1, 2\]"),
        ("mixture(distributional(a=0.5))", "put it outside the mixture"),
        ("distributional(a=0.5) * distributional(a=0.6)", "the mean of a is prescribed twice"),
        ("__import__('os').getcwd()", "is no target"),
    ],
)
def test_what_cannot_be_a_target_is_answered(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        energy(text)


def test_grades_that_do_not_fit_are_answered() -> None:
    with pytest.raises(ValueError, match=r"gives no 'style'; it gives accuracy, score, finished"):
        posterior("style", beta=1.0).factor(GRADES, {})
    with pytest.raises(ValueError, match=r"the grade is 0\.5 in places and must be 0 or 1; use posterior\(score"):
        pointwise("score").factor(GRADES, {})
    with pytest.raises(ValueError, match="multiplies nothing"):
        product()
