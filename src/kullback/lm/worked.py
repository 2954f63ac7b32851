"""Writers of worked solutions: what a data set of procedural problems would have as its replies.

A writer is a function of (question, answer, metadata, rng) that returns the reply as text. Every way of solving that it
knows is right; it chooses one at random, so the replies to one question are a distribution with several modes, and a
model that learns them has something to lose when it is distilled.
"""

import random
import re
from collections.abc import Callable, Mapping
from typing import Any

Writer = Callable[[str, Any, Mapping[str, Any], random.Random], str]

STYLES = {"left": 0.5, "right": 0.3, "ends": 0.2}  # unequal, so that "which mode was kept" has an answer


def sum_steps(question: str, answer: Any, metadata: Mapping[str, Any], rng: random.Random) -> str:
    """A chain of sums, one step at a time, in the order of a style drawn from `STYLES`.

    >>> from unittest.mock import Mock
    >>> for style in STYLES:
    ...     print(sum_steps("", "14", {"expression": "12 + 7 - 5"}, Mock(choices=lambda *a, **k: [style])))
    12+7=19;19-5=14
    7-5=2;12+2=14
    12-5=7;7+7=14
    """
    (style,) = rng.choices(list(STYLES), weights=list(STYLES.values()))
    return write_steps(metadata["expression"], style)


def write_steps(expression: str, style: str) -> str:
    """`expression` (integers joined by + and -) solved two terms at a time.

    "left" adds the first two terms first, "right" the last two, "ends" the first and the last.
    """
    terms = [int(sign + digits) for sign, digits in re.findall(r"([+-]?)(\d+)", expression.replace(" ", ""))]
    steps = []
    while len(terms) > 1:
        first, second = {"left": (0, 1), "right": (-2, -1), "ends": (0, -1)}[style]
        total = terms[first] + terms[second]
        steps.append(f"{terms[first]}{terms[second]:+d}={total}")
        position = first % len(terms)
        del terms[second]
        terms[position] = total
    return ";".join(steps) or f"={terms[0]}"


WRITERS: dict[str, Writer] = {"sum_steps": sum_steps}
