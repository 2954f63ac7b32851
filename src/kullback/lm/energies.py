"""Unnormalised targets: what a policy should become, written down as a score of whole completions.

    log P(y | x) = log reference(y | x) + factor(x, y),    p = P / Z(x),    Z(x) = sum_y P(y | x)

A factor reads the grades that the verifier gives. Nothing normalises it here: whoever trains to p estimates Z.

    posterior(accuracy, beta=0.1)             r / beta: what KL-penalised RL converges to
    pointwise(accuracy)                       log b, b in {0, 1}: the reference given that the grade is 1
    distributional(finished=0.9)              lambda . phi, fitted so that the means of the grades are these
    pointwise(finished) * posterior(score)    a product of factors over one reference
    mixture(posterior(a), pointwise(b), shares=[0.3, 0.7])    log sum_i share_i exp factor_i

Source: Korbak et al., arXiv 2205.11275 (posterior), Khalifa et al., 2012.11635 (constraints), Go et al., 2302.08215.
"""

import ast
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

Grades = Mapping[str, Float[Tensor, "row"]]


class Energy(ABC):
    """The factor of an unnormalised target over its reference. `says` is the target in words."""

    says: str

    @property
    @abstractmethod
    def grades(self) -> tuple[str, ...]:
        """The verifier's grades that it reads."""

    @property
    @abstractmethod
    def can_be_zero(self) -> bool:
        """Whether some completion that the reference writes has P = 0."""

    @abstractmethod
    def factor(self, grades: Grades, multipliers: Mapping[str, float]) -> Float[Tensor, "row"]:
        """log P - log reference, float64, in nats; -inf where P = 0, nan where a grade is unknown.

        Args:
            multipliers: lambda by grade, for what `moments` asks.

        Raises:
            ValueError: the rows have no such grade; a grade is not what the factor needs.
        """

    def log_score(
        self, log_reference: Float[Tensor, "row"], grades: Grades, multipliers: Mapping[str, float] | None = None
    ) -> Float[Tensor, "row"]:
        """log P of whole completions."""
        return log_reference.double() + self.factor(grades, multipliers or {})

    @property
    def moments(self) -> dict[str, float]:
        """Grades whose means under p are prescribed; their multipliers must be fitted first."""
        return {}

    def __mul__(self, other: "Energy") -> "Energy":
        return product(self, other)


@final
@dataclass(frozen=True)
class Posterior(Energy):
    """See `posterior`."""

    grade: str
    beta: float

    def __str__(self) -> str:
        return f"posterior({self.grade}, beta={self.beta:g})"

    @property
    def says(self) -> str:  # type: ignore[override]
        return f"exp({self.grade} / {self.beta:g})"

    @property
    def grades(self) -> tuple[str, ...]:
        return (self.grade,)

    @property
    def can_be_zero(self) -> bool:
        return False

    def factor(self, grades: Grades, multipliers: Mapping[str, float]) -> Float[Tensor, "row"]:
        return _grade(grades, self.grade) / self.beta


@final
@dataclass(frozen=True)
class Pointwise(Energy):
    """See `pointwise`."""

    grade: str
    floor: float | None

    def __str__(self) -> str:
        return f"pointwise({self.grade}" + (")" if self.floor is None else f", floor={self.floor:g})")

    @property
    def says(self) -> str:  # type: ignore[override]
        other = "0" if self.floor is None else f"exp({self.floor:g})"
        return f"(1 where {self.grade} is 1, else {other})"

    @property
    def grades(self) -> tuple[str, ...]:
        return (self.grade,)

    @property
    def can_be_zero(self) -> bool:
        return self.floor is None

    def factor(self, grades: Grades, multipliers: Mapping[str, float]) -> Float[Tensor, "row"]:
        b = _grade(grades, self.grade)
        other = ~((b == 0) | (b == 1) | b.isnan())
        if bool(other.any()):
            raise ValueError(
                f"pointwise({self.grade}): the grade is {float(b[other][0]):g} in places and must be 0 or 1; use "
                f"posterior({self.grade}, beta=...) for graded rewards"
            )
        below = torch.full_like(b, -math.inf if self.floor is None else self.floor)
        return torch.where(b.isnan(), b, torch.where(b == 1, torch.zeros_like(b), below))


@final
@dataclass(frozen=True)
class Distributional(Energy):
    """See `distributional`."""

    wanted: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        return "distributional(" + ", ".join(f"{grade}={mean:g}" for grade, mean in self.wanted) + ")"

    @property
    def says(self) -> str:  # type: ignore[override]
        return "exp(lambda . grades), with mean " + " and ".join(f"{grade} {mean:g}" for grade, mean in self.wanted)

    @property
    def grades(self) -> tuple[str, ...]:
        return tuple(grade for grade, _ in self.wanted)

    @property
    def moments(self) -> dict[str, float]:
        return dict(self.wanted)

    @property
    def can_be_zero(self) -> bool:
        return False

    def factor(self, grades: Grades, multipliers: Mapping[str, float]) -> Float[Tensor, "row"]:
        return torch.stack([multipliers[grade] * _grade(grades, grade) for grade in self.grades]).sum(0)


@final
@dataclass(frozen=True)
class Product(Energy):
    """See `product`."""

    parts: tuple[Energy, ...]

    def __str__(self) -> str:
        return " * ".join(map(str, self.parts))

    @property
    def says(self) -> str:  # type: ignore[override]
        return " * ".join(part.says for part in self.parts)

    @property
    def grades(self) -> tuple[str, ...]:
        return _all_grades(self.parts)

    @property
    def moments(self) -> dict[str, float]:
        return {grade: mean for part in self.parts for grade, mean in part.moments.items()}

    @property
    def can_be_zero(self) -> bool:
        return any(part.can_be_zero for part in self.parts)

    def factor(self, grades: Grades, multipliers: Mapping[str, float]) -> Float[Tensor, "row"]:
        return torch.stack([part.factor(grades, multipliers) for part in self.parts]).sum(0)


@final
@dataclass(frozen=True)
class Mixture(Energy):
    """See `mixture`."""

    parts: tuple[Energy, ...]
    shares: tuple[float, ...]

    def __str__(self) -> str:
        return (
            f"mixture({', '.join(map(str, self.parts))}, shares=[{', '.join(f'{share:g}' for share in self.shares)}])"
        )

    @property
    def says(self) -> str:  # type: ignore[override]
        return "(" + " + ".join(f"{s:g} {part.says}" for s, part in zip(self.shares, self.parts, strict=True)) + ")"

    @property
    def grades(self) -> tuple[str, ...]:
        return _all_grades(self.parts)

    @property
    def can_be_zero(self) -> bool:
        return all(part.can_be_zero for part in self.parts)

    def factor(self, grades: Grades, multipliers: Mapping[str, float]) -> Float[Tensor, "row"]:
        each = [
            math.log(share) + part.factor(grades, multipliers)
            for share, part in zip(self.shares, self.parts, strict=True)
        ]
        return torch.logsumexp(torch.stack(each), 0)


def posterior(grade: str = "accuracy", *, beta: float) -> Energy:
    """P = reference * exp(r / beta): the optimum of E r - beta KL(policy || reference), a Bayesian posterior.

    Raises:
        ValueError: beta is not positive.

    Source: arXiv 2205.11275, section 4.
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"posterior({grade}, beta={beta:g}): beta must be positive and finite")
    return Posterior(grade, float(beta))


def pointwise(grade: str = "accuracy", *, floor: float | None = None) -> Energy:
    """P = reference * b, b = 1 where the grade is 1: the reference given that every completion is acceptable.

    Args:
        floor: nats; P = reference * exp(floor) where the grade is 0. None leaves P = 0 there, which reverse KL and
            chi-square(model || target) cannot have.

    Raises:
        ValueError: the floor is not a negative, finite number.
    """
    if floor is not None and not -math.inf < floor < 0:
        raise ValueError(f"pointwise({grade}, floor={floor:g}): the floor is a negative number of nats, such as -8")
    return Pointwise(grade, None if floor is None else float(floor))


def distributional(**moments: float) -> Energy:
    """P = reference * exp(lambda . grades), with lambda such that each grade has its mean under p.

    p is the law nearest to the reference, in KL(p || reference), among all with these means over the prompts.

    Raises:
        ValueError: no grade is named.
    """
    if not moments:
        raise ValueError("distributional() asks for nothing: name a grade and its mean, distributional(finished=0.9)")
    return Distributional(tuple((grade, float(mean)) for grade, mean in moments.items()))


def product(*parts: Energy) -> Energy:
    """P = reference * exp(sum of the factors): all of them at once, over one reference.

    Raises:
        ValueError: nothing to multiply; two parts prescribe the mean of one grade.
    """
    flat = tuple(one for part in parts for one in (part.parts if isinstance(part, Product) else (part,)))
    if not flat:
        raise ValueError("product() multiplies nothing: give it targets")
    asked = [grade for part in flat for grade in part.moments]
    twice = sorted({grade for grade in asked if asked.count(grade) > 1})
    if twice:
        raise ValueError(f"the mean of {' and '.join(twice)} is prescribed twice: put each into one distributional()")
    return flat[0] if len(flat) == 1 else Product(flat)


def mixture(*parts: Energy, shares: list[float] | tuple[float, ...] | None = None) -> Energy:
    """P = reference * sum_i share_i exp(factor_i); the shares are of the unnormalised scores, so Z_i count too.

    Raises:
        ValueError: nothing to mix; a share is not positive, or their number is another; a part with fitted multipliers.
    """
    shares = shares or [1.0] * len(parts)
    if not parts or len(shares) != len(parts) or not all(0 < share < math.inf for share in shares):
        raise ValueError(f"mixture: {len(parts)} targets with shares={list(shares)}: give each a positive share")
    if any(part.moments for part in parts):
        raise ValueError(
            "mixture: a distributional() part fits its multipliers to a product; put it outside the mixture"
        )
    return Mixture(tuple(parts), tuple(float(share) for share in shares))


MAKERS = {"posterior": posterior, "pointwise": pointwise, "distributional": distributional, "mixture": mixture}


def energy(text: "str | Energy") -> Energy:
    """Read a target: "pointwise(finished) * posterior(accuracy, beta=0.1)". `str` of it reads back.

    Raises:
        ValueError: it is not of that form, saying what is.

    >>> print(energy("posterior(accuracy, beta=0.5)*pointwise(finished)"))
    posterior(accuracy, beta=0.5) * pointwise(finished)
    """
    if isinstance(text, Energy):
        return text
    try:
        return _read(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError) as error:
        raise ValueError(
            f"target.score={text!r} is not understood ({getattr(error, 'msg', None) or error}); write "
            "posterior(accuracy, beta=0.1), pointwise(accuracy), distributional(finished=0.9), "
            "mixture(..., shares=[...]) or a product of them with *"
        ) from error


def _read(node: ast.expr) -> Energy:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return product(_read(node.left), _read(node.right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in MAKERS:
        read = _read if node.func.id == "mixture" else _name
        given = {item.arg: ast.literal_eval(item.value) for item in node.keywords if item.arg}
        if len(given) == len(node.keywords) and all(isinstance(value, int | float | list) for value in given.values()):
            return MAKERS[node.func.id](*map(read, node.args), **given)  # type: ignore[operator]
    raise SyntaxError(f"{ast.unparse(node)} is no target")


def _name(node: ast.expr) -> str:
    if not isinstance(node, ast.Name):
        raise SyntaxError(f"{ast.unparse(node)} is no name of a grade")
    return node.id


def _grade(grades: Grades, name: str) -> Tensor:
    if name not in grades:
        raise ValueError(f"target.score: the verifier gives no {name!r}; it gives {', '.join(grades)}")
    return grades[name].double()


def _all_grades(parts: tuple[Energy, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(grade for part in parts for grade in part.grades))
