"""The token viewer: the page's samples as a table, and what page.js shows of each of their tokens."""

import math
from collections.abc import Sequence
from typing import Any

from kullback.report.markup import cut, escape, rounded
from kullback.report.routes import Routes, Sample
from kullback.report.runs import RunData
from kullback.report.table import format_number

MAX_SAMPLES = 24  # per run, spread over the steps
TOKEN_BUDGET = 350_000  # bytes of token details in the page, over all runs


def section(runs: Sequence[RunData], samples: Sequence[Sequence[Sample]], routes: Routes, data: dict[str, Any]) -> str:
    """The viewer, the legend of the routes, and a table of the samples, in HTML."""
    heading = "<h2>Tokens</h2>"
    if not any(samples):
        return heading + '<p class="note">No samples.jsonl, so there is no text to show.</p>'
    kept, stored = len(data["samples"]), sum(len(run.samples) for run in runs)
    left_out = f" {kept} of {stored} samples are in this page, spread over the steps." if kept < stored else ""
    lines = []
    for number, (run, chosen) in enumerate(zip(runs, samples, strict=True)):
        for i, sample in enumerate(chosen):
            rewards = ", ".join(f"{name} {_short(value)}" for name, value in _rewards(sample).items())
            has_tokens = bool(data["samples"][sum(map(len, samples[:number])) + i]["tokens"])
            look = f'<button type="button" data-open="{number} {i}">tokens</button>' if has_tokens else ""
            run_name = f'<div class="small faint nojs">{escape(run.label)}</div>' if len(runs) > 1 else ""
            completion = routes.coloured(number, sample) or escape(cut(sample.get("completion")))
            lines.append(
                f'<tr data-run="{number}"><td class="narrow">{escape(sample.get("step", ""))}{run_name}</td>'
                f"<td><pre>{escape(cut(sample.get('prompt')))}</pre></td>"
                f"<td><pre>{completion}</pre></td>"
                f'<td class="narrow">{escape(sample.get("origin", ""))}</td><td class="narrow">{escape(rewards)}</td>'
                f'<td class="narrow">{look}</td></tr>'
            )
    return f"""{heading}
<p class="soft small">Each token of a completion, coloured by what training saw there. Point at a token, or use the
arrow keys, to see what the teacher and the student expected next.{left_out}</p>
<div class="bar">
<label>run<select id="pick-run"></select></label><label>sample<select id="pick-sample"></select></label>
<label>colour by<span class="switch" id="modes" role="group" aria-label="colour by"></span></label>
</div>
<div class="viewer" id="viewer">
<div><p class="eyebrow">prompt</p><pre class="prompt" id="prompt"></pre>
<p class="eyebrow">completion</p><p class="small faint" id="meta"></p>
<div class="tokens" id="tokens" role="group" aria-label="tokens of the completion"></div>
<div class="scale" id="scale"></div><div class="strip" id="strip"></div></div>
<div class="side" id="detail" aria-live="polite"></div>
</div>
{routes.legend(runs)}
<details open><summary>Samples of this run</summary><div class="samples-box"><table class="data samples">
<thead><tr><th>step</th><th>prompt</th><th>completion</th><th>text of</th><th>rewards</th><th></th></tr></thead>
<tbody>{"".join(lines)}</tbody></table></div></details>"""


def sample_data(samples: Sequence[Sequence[Sample]], routes: Routes, strings: "Strings") -> list[dict[str, Any]]:
    """What page.js shows of the samples; once the budget is spent, tokens are left out, evenly over the runs."""
    left, tokens = TOKEN_BUDGET, {}
    for i in range(max(map(len, samples), default=0)):
        for number, chosen in enumerate(samples):
            # backwards: the last samples of a run show what it learned
            if i < len(chosen) and (stored := chosen[-1 - i].get("tokens")):
                size = sum(map(_size, stored))
                if size <= left:
                    left -= size
                    tokens[number, len(chosen) - 1 - i] = [
                        _token(token, routes.number(number, token), strings) for token in stored
                    ]
    return [
        {
            "run": number,
            "step": sample.get("step"),
            "prompt": cut(sample.get("prompt")),
            "completion": "" if (number, i) in tokens else cut(sample.get("completion")),  # else in its tokens
            "origin": str(sample.get("origin", "student")),
            "rewards": {name: rounded(value) for name, value in _rewards(sample).items()},
            "tokens": tokens.get((number, i)),
        }
        for number, chosen in enumerate(samples)
        for i, sample in enumerate(chosen)
    ]


class Strings:
    """Texts by number: top-5 lists repeat the same few tokens thousands of times."""

    def __init__(self) -> None:
        self.known: list[str] = []
        self._numbers: dict[str, int] = {}

    def __call__(self, text: Any) -> int:
        text = str(text)
        if text not in self._numbers:
            self._numbers[text] = len(self.known)
            self.known.append(text)
        return self._numbers[text]


def _token(token: Sample, route: int | None, strings: Strings) -> list[Any]:
    return [
        strings(token.get("text", "")),
        *(rounded(token[name], 4) if name in token else None for name in ("divergence", "entropy", "weight")),
        int(bool(token.get("scored", True))),
        route,
        *(
            [[strings(text), rounded(probability, 4)] for text, probability in (token.get(name) or ())[:5]]
            for name in ("teacher_top", "student_top")
        ),
    ]


def _size(token: Sample) -> int:
    """About how many bytes `_token` takes in the page: ten per number, and its text where it is not a common one."""
    candidates = sum(min(5, len(token.get(name) or ())) for name in ("teacher_top", "student_top"))
    return 40 + 14 * candidates + len(str(token.get("text", "")))


def spread(samples: list[dict[str, Any]], limit: int = MAX_SAMPLES) -> list[dict[str, Any]]:
    """At most `limit` of them, evenly spaced, the first and the last among them."""
    if len(samples) <= limit:
        return samples
    return [samples[round(i * (len(samples) - 1) / (limit - 1))] for i in range(limit)]


def _rewards(sample: Sample) -> dict[str, float]:
    rewards = sample.get("rewards")
    return rewards if isinstance(rewards, dict) else {}


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else format_number(value)
