"""The named family: what each name means, its parameter, its range and its other names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from kullback.divergence.algebra import Named, combine, number
from kullback.divergence.curves import FDivergence
from kullback.divergence.members import FORWARD, JSD, REVERSE, Alpha, LeCam, TotalVariation

_HELLINGER = ("squared_hellinger", "1 - sum sqrt(target model)", -0.5)
_PEARSON = ("pearson_chi2", "sum (target - model)^2 / model", 0.0)
_NEYMAN = ("neyman_chi2", "sum (target - model)^2 / target", 0.0)

HELLINGER = Alpha(0.5, 0.25, *_HELLINGER, _HELLINGER)
PEARSON = Alpha(2.0, 2.0, *_PEARSON, _NEYMAN)
NEYMAN = Alpha(-1.0, 2.0, *_NEYMAN, _PEARSON)
JEFFREYS = Named(
    "jeffreys", combine([(1, FORWARD), (1, REVERSE)]), "sum (target - model) log(target / model)", "jeffreys"
)
CHI2_KL = Named(
    "chi2_kl",
    combine([(1, Alpha(-1.0)), (1, REVERSE)]),
    "1/2 sum (target - model)^2 / target + sum model log(model / target)",
)


@dataclass(frozen=True, eq=False)
class Member:
    """One name of the family.

    Args:
        make: from the parameter (or from nothing) to the divergence.
        equation: the definition, target first, in nats.
        parameter, low, high, closed: its symbol and range; `closed` says which ends belong to it.
        default: the parameter of the bare name.
        aliases: other names, all for the same scale and orientation.
        at_end: what unit(name(end)) is, for ends where the bare member is identically zero.
        note: where it comes from, or what it is for.
    """

    name: str
    make: Callable[..., FDivergence]
    equation: str
    parameter: str = ""
    low: float = -math.inf
    high: float = math.inf
    closed: tuple[bool, bool] = (False, False)
    default: float | None = None
    aliases: tuple[str, ...] = ()
    at_end: Mapping[float, FDivergence] = field(default_factory=dict)
    note: str = ""

    def __call__(self, *parameters: float) -> FDivergence:
        """The divergence at these parameters; the default one without."""
        expected = 1 if self.parameter else 0
        if len(parameters) > expected:
            takes = f"takes one parameter, {self.parameter}" if expected else "takes no parameter"
            raise ValueError(f'divergence="{self.text(*parameters)}": {self.name} {takes}')
        if not self.parameter:
            return self.make()
        value = float(parameters[0]) if parameters else self.default
        assert value is not None
        self.check(value)
        return self.make(value)

    def check(self, value: float) -> None:
        """Raise the sentence that says which parameters exist."""
        text = self.text(value)
        if value in self.at_end:
            raise ValueError(
                f'divergence="{text}": it is zero for every pair; '
                f"did you mean unit({text}), its limit on unit scale, which is {self.at_end[value]}?"
            )
        low = self.low <= value if self.closed[0] else self.low < value
        high = value <= self.high if self.closed[1] else value < self.high
        if not (low and high and math.isfinite(value)):
            raise ValueError(
                f'divergence="{text}": {self.parameter} must be {self.range}; did you mean {self.text(self.default)}?'
            )

    def text(self, *parameters: float | None) -> str:
        given = ", ".join(number(p) if p is not None and math.isfinite(p) else str(p) for p in parameters)
        return f"{self.name}({given})" if given else self.name

    @property
    def range(self) -> str:
        if math.isinf(self.low) and math.isinf(self.high):
            return "a finite number"
        left, right = "[" if self.closed[0] else "(", "]" if self.closed[1] else ")"
        return f"in {left}{number(self.low)}, {number(self.high)}{right}"

    @property
    def bounds(self) -> tuple[float, float]:
        """(0, sup D) at the default parameter; the supremum belongs to disjoint supports."""
        return self().bounds


def _skew_kl(a: float) -> FDivergence:
    if a == 0:
        return FORWARD
    text, back = f"skew_kl({number(a)})", f"skew_reverse_kl({number(a)})"
    x = f"{number(a)} target + (1 - {number(a)}) model"
    return Named(text, FORWARD.skew(a), f"KL(target || x), x = {x}", back)


def _skew_reverse_kl(a: float) -> FDivergence:
    if a == 0:
        return REVERSE
    text, back = f"skew_reverse_kl({number(a)})", f"skew_kl({number(a)})"
    x = f"{number(a)} model + (1 - {number(a)}) target"
    return Named(text, FORWARD.skew(a).reversed, f"KL(model || x), x = {x}", back)


_FAMILY: dict[str, Member] = {}
_ALIASES: dict[str, str] = {}

# Names that say no direction or no scale, and what to say instead.
AMBIGUOUS = {
    "kl": "forward_kl is KL(target || model), reverse_kl is KL(model || target)",
    "js": "jsd(0.5) is the Jensen-Shannon divergence, at most log 2; f-DPO and TRL's DPO call 2*jsd(0.5) js",
    "chi2": "pearson_chi2 divides by the model, neyman_chi2 by the target",
    "skl": "jeffreys is the sum of both KLs, skew_kl(0.1) that of DistiLLM",
}


def divergences() -> Mapping[str, Member]:
    """The named family: name -> Member, with parameter, range, default, aliases, bounds and equation. Read-only.

    >>> list(divergences())[:4]
    ['forward_kl', 'reverse_kl', 'jeffreys', 'jsd']
    >>> divergences()["jsd"].range
    'in (0, 1)'
    """
    return MappingProxyType(_FAMILY)


def aliases() -> Mapping[str, str]:
    """alias -> name."""
    return MappingProxyType(_ALIASES)


def add(member: Member) -> None:
    """Put a member into the family."""
    for name in (member.name, *member.aliases):
        if name in _FAMILY or name in _ALIASES:
            raise ValueError(f'name="{name}": already taken by {_ALIASES.get(name, name)}; choose another')
    _FAMILY[member.name] = member
    _ALIASES.update(dict.fromkeys(member.aliases, member.name))


def register(name: str, divergence: FDivergence | Callable[..., FDivergence], **about: Any) -> None:
    """Give a divergence of your own a name, so that recipes, the command line and `divergence(name)` know it.

    Args:
        divergence: the divergence, or a function from one parameter to it; then say which: `parameter="c"`, and if
            needed `low`, `high`, `closed`, `default` (see `Member`).

    Raises:
        ValueError: the name is taken, or not a lower-case word.

    >>> register("cubic", FDivergence.from_generator(lambda u: abs(u - 1) ** 3, name="cubic"))
    >>> divergences()["cubic"]()
    divergence("cubic")
    >>> unregister("cubic")
    """
    if not (name.isidentifier() and name == name.lower()) or name in ("unit", "reversed", "skew", *AMBIGUOUS):
        raise ValueError(f'name="{name}": use a lower-case word that is not yet taken, such as "my_divergence"')
    if isinstance(divergence, FDivergence):
        known = divergence if divergence.name == name else Named(name, divergence, divergence.equation)
        add(Member(name, lambda: known, known.equation, **about))
        return
    about.setdefault("equation", (divergence.__doc__ or name).strip().splitlines()[0])
    if about.get("parameter") and about.get("default") is None:
        raise ValueError(f'name="{name}": say the default of {about["parameter"]}, which the bare name stands for')
    add(Member(name, divergence, **about))


def unregister(name: str) -> None:
    """Forget a divergence that `register` added."""
    _FAMILY.pop(name)
    for alias in [alias for alias, known in _ALIASES.items() if known == name]:
        del _ALIASES[alias]


for _member in (
    Member("forward_kl", lambda: FORWARD, FORWARD.equation, aliases=("fkl",), note="covers the target's modes"),
    Member("reverse_kl", lambda: REVERSE, REVERSE.equation, aliases=("rkl",), note="seeks a mode of the target"),
    Member("jeffreys", lambda: JEFFREYS, JEFFREYS.equation, aliases=("symmetric_kl",), note="the sum of both KLs"),
    Member(
        "jsd",
        JSD,
        "beta KL(target || x) + (1 - beta) KL(model || x), x = beta target + (1 - beta) model",
        parameter="beta",
        low=0.0,
        high=1.0,
        default=0.5,
        aliases=("generalized_jsd", "generalised_jsd", "jensen_shannon"),
        at_end={0.0: FORWARD, 1.0: REVERSE},
        note="generalised as in GKD; jsd(0.5) is the Jensen-Shannon divergence",
    ),
    Member(
        "skew_kl",
        _skew_kl,
        "KL(target || x), x = a target + (1 - a) model",
        parameter="a",
        low=0.0,
        high=1.0,
        closed=(True, False),
        default=0.1,
        at_end={1.0: Alpha(-1.0)},
        note="DistiLLM",
    ),
    Member(
        "skew_reverse_kl",
        _skew_reverse_kl,
        "KL(model || x), x = a model + (1 - a) target",
        parameter="a",
        low=0.0,
        high=1.0,
        closed=(True, False),
        default=0.1,
        aliases=("skew_rkl",),
        at_end={1.0: Alpha(2.0)},
        note="DistiLLM",
    ),
    Member(
        "alpha",
        Alpha,
        "sum (target^a model^(1-a) - model) / (a (a - 1))",
        parameter="a",
        default=0.5,
        aliases=("alpha_divergence",),
        note="reverse KL at 0, forward KL at 1; any real a",
    ),
    Member("squared_hellinger", lambda: HELLINGER, HELLINGER.equation, aliases=("hellinger",), note="alpha(0.5) / 4"),
    Member("tv", TotalVariation, TotalVariation.equation, aliases=("total_variation",), note="half the L1 distance"),
    Member("pearson_chi2", lambda: PEARSON, PEARSON.equation, aliases=("pearson",), note="2*alpha(2)"),
    Member("neyman_chi2", lambda: NEYMAN, NEYMAN.equation, aliases=("neyman",), note="2*alpha(-1)"),
    Member("chi2_kl", lambda: CHI2_KL, CHI2_KL.equation, aliases=("chi_po",), note="chi-PO: alpha(-1) + reverse_kl"),
    Member(
        "le_cam", LeCam, LeCam.equation, aliases=("vincze_le_cam",), note="pearson_chi2.skew(0.5), as an algebraic fact"
    ),
):
    add(_member)
