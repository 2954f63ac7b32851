"""Which terms of the objective train each token: the samples name them, the objective says what they are."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from kullback.report.markup import cut, escape
from kullback.report.runs import RunData
from kullback.report.style import COLORS

NOBODY = "no term trains these tokens"
Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Route:
    """The terms that train a token, as the samples have them ("policy + key"), and a line of words on each."""

    name: str
    says: str


class Routes:
    """The routes of some runs by number, in order of appearance.

    A name of which two runs' objectives say different things is two routes: "match/teacher" by two divergences.

    Args:
        samples: those of each run that the page shows.
    """

    def __init__(self, runs: Sequence[RunData], samples: Sequence[Sequence[Sample]]) -> None:
        self.known: list[Route] = []
        self._numbers: list[dict[str, int]] = [{} for _ in runs]
        self._counts = [
            Counter(str(token["route"]) for sample in chosen for token in _tokens(sample) if token.get("route"))
            for chosen in samples
        ]
        for run, counts, numbers in zip(runs, self._counts, self._numbers, strict=True):
            for name in counts:
                route = Route(name, _words(name, run.objective))
                if route not in self.known:
                    self.known.append(route)
                numbers[name] = self.known.index(route)

    def number(self, run: int, token: Mapping[str, Any]) -> int | None:
        """None where the token has no route."""
        return self._numbers[run].get(str(token.get("route")))

    def several(self, run: int) -> bool:
        """Whether the tokens of a run go different ways: else there is nothing to tell apart."""
        return len(self._numbers[run]) > 1

    def legend(self, runs: Sequence[RunData]) -> str:
        """Colour, terms, words and share of the tokens of each route; nothing where no run has several."""
        if not any(map(self.several, range(len(runs)))):
            return ""
        lines = []
        for place, (run, numbers, counts) in enumerate(zip(runs, self._numbers, self._counts, strict=True)):
            label = f'<div class="small faint nojs">{escape(run.label)}</div>' if len(runs) > 1 else ""
            for name, number in numbers.items():
                says = escape(self.known[number].says).replace("\n", "<br>")
                lines.append(
                    f'<tr data-run="{place}"><th scope="row">{_mark(number, name)}{label}</th><td>{says}</td>'
                    f"<td>{counts[name] / counts.total():.1%}</td></tr>"
                )
        return (
            '<h3 class="routes">Routes</h3><p class="soft small">Which terms of the objective train a token: below in '
            "the text of the samples, and above with “colour by route”.</p>"
            '<div class="scroll"><table class="data routes"><thead><tr><th>route</th><th>terms</th>'
            f"<th>share of the tokens shown</th></tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        )

    def coloured(self, run: int, sample: Sample) -> str | None:
        """A completion as HTML, coloured by route.

        None where it has nothing to tell apart, or where the tokens' texts do not make up the completion, because a
        character is cut into several of them.
        """
        tokens = _tokens(sample)
        text = "".join(str(token.get("text", "")) for token in tokens)
        if not self.several(run) or not tokens or str(sample.get("completion", "")) not in text:
            return None
        kept = len(cut(text, ""))
        left, pieces = kept, []
        for number, same in groupby(tokens, key=lambda token: self.number(run, token)):
            piece = "".join(str(token.get("text", "")) for token in same)[:left]
            left -= len(piece)
            if piece:
                pieces.append(escape(piece) if number is None else _mark(number, piece, self.known[number].name))
        return "".join(pieces) + escape(cut(text)[kept:])


def _mark(number: int, text: str, title: str = "") -> str:
    about = f' title="{escape(title)}"' if title else ""
    return f'<span class="r{number % len(COLORS)}"{about}>{escape(text)}</span>'


def _tokens(sample: Sample) -> Sequence[Mapping[str, Any]]:
    return sample.get("tokens") or ()


def _words(name: str, objective: str) -> str:
    """What the objective says of each term of a route: the divergence or the gradient, without how it is averaged."""
    if name == "none":
        return NOBODY
    lines = []
    for term in name.split(" + "):
        said = next((line for line in objective.splitlines() if line.startswith(f"{term}: ")), f"{term}:")
        lines.append(said.partition(";")[0])
    return "\n".join(lines)
