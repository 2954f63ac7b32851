"""The laboratory: policies over a finite outcome set, where every expectation is a sum and every optimum is exact.

A policy is its log-probabilities, a float64 tensor [..., outcome]; leading axes are independent problems. A reward is a
tensor that broadcasts with it. `target` and `model` keep their roles: D(target = reference, model = policy).

    reference = random_policy(50, seed=0)
    best = optimum(reference, reward, "jsd(0.5)", budget=0.1)
    best.reward, best.coefficient, best.log_probs

    best = argmax  E_policy r  -  coefficient * D(reference, policy)     over all policies << reference
         = reference / u,      link(u(y)) = (r(y) - normaliser) / coefficient,     u from D.inverse_link

The coefficient multiplies the divergence, as in RLHF; 1 / coefficient multiplies the reward in a tilt.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.divergence import FDivergence
from kullback.divergence import divergence as parse
from kullback.estimate import (
    check_laws,
    cumulants,
    ends,
    expand,
    expectation,
    find_root,
    legendre,
    log_partition,
    tilt,
    variance,
)

__all__ = [
    "Optimum",
    "bregman",
    "cumulants",
    "descend",
    "entropy",
    "expectation",
    "gradient",
    "implicit_reward",
    "legendre",
    "log_partition",
    "objective",
    "optimum",
    "preference_loss",
    "random_policy",
    "score_gradient",
    "tilt",
    "variance",
]

Number = float | Tensor


@dataclass(frozen=True)
class Optimum:
    """The best policy for a reward and a divergence from a reference.

    Args:
        log_probs: -inf where the divergence lets the optimum give an outcome up (tv, neyman_chi2, le_cam).
        coefficient: of the divergence; 0 where the budget binds nothing, inf where it is 0.
        normaliser: lambda of link(u) = (reward - lambda) / coefficient; for reverse KL coefficient * log Z.
        distance: D(reference, optimum), nats at the divergence's own scale.
        reward: its expectation.
    """

    log_probs: Float[Tensor, "*batch outcome"]
    coefficient: Float[Tensor, "*batch"]
    normaliser: Float[Tensor, "*batch"]
    distance: Float[Tensor, "*batch"]
    reward: Float[Tensor, "*batch"]

    def gap(self, distance: Number, reward: Number) -> Tensor:
        """How far a policy with this distance from the reference and this expected reward is from the optimum, nats.

            distance - self.distance + (self.reward - reward) / coefficient

        That is the Bregman divergence of D(reference, .) between the policy and the optimum, and for reverse KL it is
        KL(policy || optimum): two numbers of a policy say how close all of it must be. Where the optimum gives outcomes
        up it is an upper bound of the Bregman divergence. Source: arXiv 2404.01730, on near-optimal policies.

        Raises:
            ValueError: the coefficient is 0 or inf, where no such identity holds.
        """
        if not bool(((self.coefficient > 0) & self.coefficient.isfinite()).all()):
            raise ValueError(
                f"coefficient={self.coefficient.min():g} to {self.coefficient.max():g}: the identity needs one that "
                "is positive and finite; choose a budget above 0 and below the distance of the best outcome alone"
            )
        return distance - self.distance + (self.reward - reward) / self.coefficient


def optimum(
    reference: Float[Tensor, "*batch outcome"],
    reward: Float[Tensor, "*batch outcome"],
    divergence: str | FDivergence = "reverse_kl",
    *,
    coefficient: Number | None = None,
    budget: Number | None = None,
    expected_reward: Number | None = None,
) -> Optimum:
    """The best policy at a coefficient, within a budget D(reference, policy) <= budget, or at an expected reward.

    Exactly one of the three is given; each may have the batch's shape. The unknown that is solved for is the log-ratio
    of the best outcomes, which lies between log reference(best) and 0; every other outcome follows from it. Where the
    link is bounded at an infinite ratio, outcomes whose reward is too low get no mass at all.

    Differentiable in reference, reward and coefficient (first order) when the coefficient is given; otherwise it is
    solved for without gradient.

    Args:
        reference: outcomes of probability 0 stay at 0.
        budget: in the divergence's own scale. What is not needed is not spent: from D(reference, best outcomes alone)
            on, the optimum is the reference restricted to its best outcomes, with coefficient 0.
        expected_reward: between the reference's own and the best.

    Raises:
        ValueError: none or several of the three are given; coefficient <= 0; budget < 0; the expected reward cannot be
            reached; the reward is not finite; the reference does not sum to 1.

    >>> coin = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    >>> best = optimum(coin, torch.tensor([0.0, 1.0]), coefficient=1.0)
    >>> [round(p, 4) for p in best.log_probs.exp().tolist()]  # 1 : e
    [0.2689, 0.7311]
    """
    given = {"coefficient": coefficient, "budget": budget, "expected_reward": expected_reward}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(
            f"{', '.join(named) or 'nothing'} given: give exactly one of coefficient, budget, expected_reward"
        )
    reference, reward = check_laws(reference.double(), reward.double(), name="reference")
    problem = _Problem(reference.log_softmax(-1), reward, _parse(divergence))
    (wanted,) = (torch.as_tensor(given[name], dtype=torch.float64, device=reference.device) for name in named)
    if coefficient is not None:
        if not bool((wanted > 0).all() and wanted.isfinite().all()):
            raise ValueError(
                f"coefficient={float(wanted.min()):g}: must be positive and finite; budget=inf gives the best outcomes "
                "alone, budget=0 the reference"
            )
        return problem.result(wanted.expand(reference.shape[:-1]))
    with torch.no_grad():
        return problem.at_budget(wanted) if budget is not None else problem.at_reward(wanted)


@dataclass(frozen=True)
class _Problem:
    reference: Tensor
    reward: Tensor
    D: FDivergence

    def result(self, coefficient: Tensor) -> Optimum:
        """The optimum at a positive, finite coefficient for each law.

        Solved for x, the log-ratio of the best outcomes: link(u(y)) = link(x) - (highest reward - r(y)) / coefficient.
        """
        _, highest = ends(self.reference, self.reward)
        gaps = (highest[..., None] - self.reward) / coefficient[..., None]
        best = (gaps == 0) & self.possible

        def log_ratio(x: Tensor) -> Tensor:
            goal = self.D.link(x)[..., None] - gaps
            lost = goal <= self.D.link_at_infinity
            others = self.D.inverse_link(torch.where(lost, torch.zeros_like(goal), goal))
            others = torch.maximum(torch.where(lost, torch.inf, others), x.detach()[..., None])  # up to rounding it is
            return torch.where(best, x[..., None], others)

        def excess(x: Tensor) -> Tensor:
            """sum_y reference / u - 1, without cancellation where every u is nearly 1."""
            return (self.reference.exp() * torch.expm1(-log_ratio(x))).sum(-1)

        def tame(x: Tensor) -> Tensor:
            over = excess(x).clamp(max=1e300)
            return over / (2 + over)

        with torch.no_grad():
            least = torch.logsumexp(torch.where(best, self.reference, -torch.inf), -1).clamp(max=0)
            x = find_root(
                tame, 1.000001 * least, torch.zeros_like(least)
            )  # at `least` the best outcomes alone sum to 1
        if torch.is_grad_enabled() and any(t.requires_grad for t in (self.reference, self.reward, coefficient)):
            x = x - (moved := excess(x)) / (slope := self._slope(x, log_ratio(x), best)) + moved.detach() / slope
        log_probs = torch.where(self.possible, self.reference - log_ratio(x), -torch.inf).log_softmax(-1)
        return self._describe(log_probs, coefficient, highest - coefficient * self.D.link(x))

    @torch.no_grad()
    def _slope(self, x: Tensor, log_ratio: Tensor, best: Tensor) -> Tensor:
        """d excess / dx: each outcome follows as d log u = h(x) / h(u) dx. For the implicit function theorem."""
        kept = self.possible & log_ratio.isfinite()
        curvature = self.D.curvature(torch.where(kept, log_ratio, torch.zeros_like(log_ratio)))
        follows = torch.where(best, 1.0, (self.D.curvature(x)[..., None] / curvature).nan_to_num(0, 0, 0))
        return -torch.where(kept, (self.reference - log_ratio).exp() * follows, torch.zeros_like(follows)).sum(-1)

    def at_budget(self, budget: Tensor) -> Optimum:
        most = self.D.from_log_probs(self.reference, self.whole)
        budget = budget.expand_as(most)
        if not bool((budget >= 0).all()):
            raise ValueError(f"budget={float(budget.min()):g}: must not be negative; 0 is the reference itself")
        to_best = (budget >= most * (1 - NEARLY)) & ~self.flat
        inside = (budget > NEARLY**2) & ~to_best & ~self.flat
        return self._search(lambda found: found.distance - budget, inside, to_best)

    def at_reward(self, level: Tensor) -> Optimum:
        own, (_, highest) = expectation(self.reference, self.reward), ends(self.reference, self.reward)
        level, slack = level.expand_as(own), NEARLY * (highest - own) + NEARLY * own.abs()
        outside = ~((level >= own - slack) & (level <= highest + slack))
        if bool(outside.any()):
            raise ValueError(
                f"expected_reward={float(level[outside][0]):g}: the reference has {float(own[outside][0]):g} and its "
                f"best outcomes {float(highest[outside][0]):g}; choose a value between"
            )
        to_best = (level >= highest - slack) & ~self.flat
        return self._search(lambda found: found.reward - level, (level > own + slack) & ~to_best, to_best)

    def _search(self, excess: Callable[[Optimum], Tensor], inside: Tensor, to_best: Tensor) -> Optimum:
        """The optimum at which a quantity that falls with the coefficient is 0.

        Where it is not `inside`: the best outcomes alone or, without `to_best`, the reference.
        """
        lowest, highest = ends(self.reference, self.reward)
        unit = torch.where(self.flat, torch.ones_like(highest), highest - lowest)

        def over(found: Optimum) -> Tensor:
            return torch.where(inside, excess(found), torch.zeros_like(unit))

        def at(log_coefficient: Tensor) -> Optimum:
            return self.result(unit * log_coefficient.exp())

        one = torch.ones_like(unit)
        low = -expand(lambda x: over(at(-x)), one, factor=2.0, most=8)
        high = expand(lambda x: -over(at(x)), one, factor=2.0, most=8)
        root = find_root(lambda x: over(at(x)), low, high)
        found = at(root)
        log_probs = found.log_probs
        if not self.D.smooth:  # at a jump both sides are optimal, and so is any mixture: the one that meets the goal
            near, far = at(root + NEARLY).log_probs, at(root - NEARLY).log_probs

            def mixture(share: Tensor) -> Tensor:
                return torch.logaddexp(near + torch.log1p(-share)[..., None], far + share.log()[..., None])

            def over_mixed(share: Tensor) -> Tensor:
                return over(self._describe(mixture(share), found.coefficient, found.normaliser))

            ends_differ = (over_mixed(0 * one) <= 0) & (over_mixed(one) >= 0)
            share = find_root(lambda x: torch.where(ends_differ, over_mixed(x), torch.zeros_like(x)), 0 * one, one)
            log_probs = mixture(share)
        kept = inside[..., None]
        log_probs = torch.where(kept, log_probs, torch.where(to_best[..., None], self.whole, self.reference))
        outside = torch.where(to_best, torch.zeros_like(unit), torch.full_like(unit, torch.inf))
        end = torch.where(to_best, highest, expectation(self.reference, self.reward))
        return self._describe(
            log_probs, torch.where(inside, found.coefficient, outside), torch.where(inside, found.normaliser, end)
        )

    def _describe(self, log_probs: Tensor, coefficient: Tensor, normaliser: Tensor) -> Optimum:
        distance = self.D.from_log_probs(self.reference, log_probs, target_grad=True)
        return Optimum(log_probs, coefficient, normaliser, distance, expectation(log_probs, self.reward))

    @property
    def possible(self) -> Tensor:
        return self.reference > -torch.inf

    @property
    def whole(self) -> Tensor:
        """The reference given its best outcomes."""
        return tilt(self.reference, self.reward, math.inf)

    @property
    def flat(self) -> Tensor:
        """Where the reference gives one reward only, and nothing can be gained."""
        lowest, highest = ends(self.reference, self.reward)
        return lowest == highest


NEARLY = 1e-12  # relative: what counts as the end of a range, and as the other side of a jump


def objective(
    policy: Float[Tensor, "*batch outcome"],
    reference: Float[Tensor, "*batch outcome"],
    reward: Float[Tensor, "*batch outcome"],
    divergence: str | FDivergence,
    coefficient: Number,
) -> Float[Tensor, "*batch"]:
    """E_policy r - coefficient * D(reference, policy). Differentiable in the policy and the reward; `optimum` is its
    maximiser. The reference is detached."""
    return expectation(policy, reward) - coefficient * _parse(divergence).from_log_probs(reference, policy)


def entropy(policy: Float[Tensor, "*batch outcome"]) -> Float[Tensor, "*batch"]:
    """-sum_y policy log policy, nats."""
    return -expectation(policy, policy)


def bregman(
    divergence: str | FDivergence,
    reference: Float[Tensor, "*batch outcome"],
    policy: Float[Tensor, "*batch outcome"],
    center: Float[Tensor, "*batch outcome"],
) -> Float[Tensor, "*batch"]:
    """The Bregman divergence of D(reference, .) between a policy and a center of the reference's support, nats.

        D(reference, policy) - D(reference, center) - sum_y g(u_center(y)) (policy(y) - center(y)),    g the link

    For reverse KL it is KL(policy || center), whatever the reference; for no other divergence is it a function of the
    two alone.
    """
    D = _parse(divergence)
    slope = D.link(reference - center)
    change = policy.exp() - center.exp()
    slope = torch.where(change == 0, torch.zeros_like(slope), slope)
    return D.from_log_probs(reference, policy) - D.from_log_probs(reference, center) - (slope * change).sum(-1)


def gradient(
    function: Callable[[Tensor], Tensor], logits: Float[Tensor, "*batch outcome"]
) -> Float[Tensor, "*batch outcome"]:
    """d function(policy) / d logits with policy = logits.log_softmax(-1), exactly; batches are summed, so each law has
    its own."""
    logits = logits.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(function(logits.log_softmax(-1)).sum(), logits)
    return found


def score_gradient(
    policy: Float[Tensor, "*batch outcome"], advantage: Float[Tensor, "*batch outcome"]
) -> Float[Tensor, "*batch outcome"]:
    """E_policy[A(y) grad_logits log policy(y)] = policy * (A - E_policy A): REINFORCE with every sample enumerated.

    With A = r - coefficient * D.link(reference - policy) it is the gradient of `objective`.
    """
    weighted = torch.where(policy == -torch.inf, torch.zeros_like(advantage), advantage)
    return policy.exp() * (weighted - expectation(policy, weighted)[..., None])


def implicit_reward(
    policy: Float[Tensor, "*batch outcome"],
    reference: Float[Tensor, "*batch outcome"],
    divergence: str | FDivergence,
    coefficient: Number,
) -> Float[Tensor, "*batch outcome"]:
    """coefficient * link(reference / policy): the reward, up to a constant, for which the policy is the optimum.

    Raises:
        ValueError: the link is bounded as the policy's mass goes to 0, so that the reward of an outcome that the
            optimum gives up cannot be read from it.
    """
    D = _parse(divergence)
    if not D.has_closed_form:
        raise ValueError(
            f'divergence="{D}": its link stops at {D.link_at_infinity:g} where the policy vanishes, so no reward below '
            "that can be read from a policy; add a KL term, as chi2_kl does"
        )
    return coefficient * D.link(reference - policy)


def preference_loss(
    score: Float[Tensor, "*batch outcome"],
    reward: Float[Tensor, "*batch outcome"],
    pair_weight: Float[Tensor, "outcome outcome"] | None = None,
) -> Float[Tensor, "*batch"]:
    """The logistic loss of all pairs, labelled by Bradley-Terry: what a preference method minimises with endless data.

        sum_{y != y'} w(y, y') [ -s(r(y) - r(y')) log s(score(y) - score(y')) ],    s the logistic function

    Least where score - reward is constant. With `implicit_reward` as score it is f-DPO's loss, and its minimiser over
    policies is `optimum`. Differentiable in the score.

    Args:
        pair_weight: of the ordered pair (y, y'), scaled to sum 1 without its diagonal; None weighs all alike.
    """
    size = score.shape[-1]
    weight = torch.ones(size, size, dtype=score.dtype) if pair_weight is None else pair_weight
    weight = weight * (1 - torch.eye(size, dtype=score.dtype))
    prefer = torch.sigmoid(reward[..., :, None] - reward[..., None, :]).detach()
    margin = score[..., :, None] - score[..., None, :]
    return -(weight / weight.sum() * prefer * torch.nn.functional.logsigmoid(margin)).sum((-2, -1))


def random_policy(outcomes: int, *batch: int, seed: int, concentration: float = 1.0) -> Float[Tensor, "*batch outcome"]:
    """Log-probabilities from a symmetric Dirichlet law, float64.

    Args:
        concentration: 1 is uniform on the simplex; small values put the mass on few outcomes.

    >>> random_policy(3, seed=0).exp().sum().item()
    1.0
    """
    draw = torch.Generator().manual_seed(seed)
    shape = torch.full((*batch, outcomes), float(concentration), dtype=torch.float64)
    return torch._standard_gamma(shape, generator=draw).clamp_min(1e-300).log().log_softmax(-1)


def descend(
    loss: Callable[[Tensor], Tensor],
    logits: Float[Tensor, "*batch outcome"],
    *,
    steps: int,
    learning_rate: float = 0.05,
    cooling: bool = False,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Float[Tensor, "*batch outcome"]:
    """Train a softmax policy: Adam on the logits of loss(policy), summed over a batch. The policy it ends at.

    Args:
        loss: of the policy's log-probabilities; it may draw samples.
        cooling: the learning rate falls linearly to 0.
        watch: called with the number of steps done and the policy, before the first step and after each.
    """
    logits = logits.detach().clone().requires_grad_()
    adam = torch.optim.Adam([logits], lr=learning_rate)
    for step in range(steps + 1):
        if watch is not None:
            watch(step, logits.detach().log_softmax(-1))
        if step == steps:
            break
        for group in adam.param_groups:
            group["lr"] = learning_rate * (1 - step / steps) if cooling else learning_rate
        adam.zero_grad()
        loss(logits.log_softmax(-1)).sum().backward()
        adam.step()
    return logits.detach().log_softmax(-1)


def _parse(divergence: str | FDivergence) -> FDivergence:
    return parse(divergence) if isinstance(divergence, str) else divergence
