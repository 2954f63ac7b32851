"""The text form of a divergence.

sum     = product ("+" product)*
product = [number "*"] factor ["*" number]
factor  = name ["(" number ")"] | "unit(" sum ")" | "reversed(" sum ")" | "skew(" sum "," number ")" | "(" sum ")"
"""

from __future__ import annotations

import difflib
import math
import re

from kullback.divergence.algebra import combine
from kullback.divergence.curves import FDivergence
from kullback.divergence.family import AMBIGUOUS, Member, aliases, divergences

_TOKEN = re.compile(r"\s*(?:(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_]\w*)|(?P<sign>.))")
_OPERATORS = ("unit", "reversed", "skew")


def divergence(text: str | FDivergence) -> FDivergence:
    """The divergence that `text` names; an FDivergence is returned as it is.

    A bare name is on textbook scale; `unit(...)` divides by f''(1), so that near equality it is KL to second order.

    Raises:
        ValueError: an unknown name (the nearest ones are given), a parameter out of range, or text that does not parse.

    >>> print(divergence("0.7*forward_kl + 0.3*reverse_kl"))
    0.7*forward_kl + 0.3*reverse_kl
    >>> divergence("unit(jsd(0))") == divergence("forward_kl")
    True
    >>> divergence("jsd(1.5)")
    Traceback (most recent call last):
    ValueError: divergence="jsd(1.5)": beta must be in (0, 1); did you mean jsd(0.5)?
    """
    if isinstance(text, FDivergence):
        return text
    if not isinstance(text, str):
        raise ValueError(f"divergence={text!r}: give a name, such as 'forward_kl', or an FDivergence")
    return _Parser(text).parse()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = [(m.lastgroup or "", m.group(m.lastgroup or 0)) for m in _TOKEN.finditer(text.strip())]
        self.tokens = self._split_signs()
        self.at = 0

    def _split_signs(self) -> list[tuple[str, str]]:
        """A sign glued to a number is part of it only after "(", "," or "*" or at the start: `a+0.3*b` is a sum."""
        out: list[tuple[str, str]] = []
        for kind, token in self.tokens:
            if kind == "number" and token[0] in "+-" and out and out[-1][1] not in ("(", ",", "*", "+"):
                out += [("sign", token[0]), ("number", token[1:])]
            else:
                out.append((kind, token))
        return out

    def parse(self) -> FDivergence:
        result = self._sum()
        if self.at < len(self.tokens):
            raise self._error(f'unexpected "{self._peek()}"')
        return result

    def _sum(self) -> FDivergence:
        terms = [self._product()]
        while self._peek() in ("+", "-"):
            if self._peek() == "-":
                raise self._error("a difference is not a divergence; coefficients must be positive")
            self.at += 1
            terms.append(self._product())
        return terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else self._combine(terms)

    def _combine(self, terms: list[tuple[float, FDivergence]]) -> FDivergence:
        return combine(terms)

    def _product(self) -> tuple[float, FDivergence]:
        coefficient = 1.0
        if self._kind() == "number":
            coefficient = self._number()
            self._expect("*")
        inner = self._factor(unit=False)
        while self._peek() == "*":
            self.at += 1
            coefficient *= self._number()
        return coefficient, inner

    def _factor(self, unit: bool) -> FDivergence:
        if self._peek() == "(":
            self.at += 1
            inner = self._sum()
            self._expect(")")
            return inner
        if self._kind() != "name":
            raise self._error(f'expected a name, found "{self._peek() or "the end"}"')
        name = self._take().lower()
        if name in _OPERATORS:
            return self._operator(name)
        member = self._member(name)
        if self._peek() != "(":
            return member()
        self.at += 1
        parameters = [self._number()] if self._peek() != ")" else []
        while self._peek() == ",":
            self.at += 1
            parameters.append(self._number())
        self._expect(")")
        if unit and len(parameters) == 1 and parameters[0] in member.at_end and self._peek() == ")":
            return member.at_end[parameters[0]]
        return member(*parameters)

    def _operator(self, name: str) -> FDivergence:
        self._expect("(")
        if name == "unit" and self._kind() == "name" and self._next() == "(":
            start = self.at
            inner = self._factor(unit=True)
            if self._peek() != ")":  # unit(jsd(0.1) + ...): a sum, read it as one
                self.at = start
                inner = self._sum()
        else:
            inner = self._sum()
        if name == "skew":
            self._expect(",")
            share = self._number()
            self._expect(")")
            return inner.skew(share)
        self._expect(")")
        return inner.unit if name == "unit" else inner.reversed

    def _member(self, name: str) -> Member:
        family, others = divergences(), aliases()
        if name in AMBIGUOUS and name not in family:
            raise ValueError(f'divergence="{self.text}": "{name}" is ambiguous: {AMBIGUOUS[name]}')
        known = others.get(name, name)
        if known in family:
            return family[known]
        near = difflib.get_close_matches(name, [*family, *others, *_OPERATORS], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(family)}"
        raise ValueError(f'divergence="{self.text}": unknown name "{name}"; {hint}')

    def _number(self) -> float:
        if self._kind() != "number":
            raise self._error(f'expected a number, found "{self._peek() or "the end"}"')
        value = float(self._take())
        if not math.isfinite(value):
            raise self._error("numbers must be finite")
        return value

    def _expect(self, sign: str) -> None:
        if self._peek() != sign:
            raise self._error(f'expected "{sign}", found "{self._peek() or "the end"}"')
        self.at += 1

    def _take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1][1]

    def _peek(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def _next(self) -> str:
        return self.tokens[self.at + 1][1] if self.at + 1 < len(self.tokens) else ""

    def _kind(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def _error(self, what: str) -> ValueError:
        return ValueError(f'divergence="{self.text}": {what}; write for example "0.7*forward_kl + 0.3*reverse_kl"')
