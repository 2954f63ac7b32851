"""A report shows what the run directories hold: the same numbers, any text as text, and what is missing as missing."""

import json
import math
import re
import warnings
from html.parser import HTMLParser

import pytest
from rich.console import Console

from kullback.report import comparison_markdown, comparison_rows, comparison_table, figures, load_runs, write_report
from kullback.report.curves import smoothed
from kullback.report.style import styles
from kullback.run.directory import RunDirectory, write_comparison

EVIL = "</script><script>alert('1')</script><img src=x onerror=\"alert(2)\">&amp;\u2028\u2029<!--"


def metrics(accuracy, entropy, error=0.02):
    def metric(value, standard_error=error):
        return {"value": value, "standard_error": standard_error}

    return {
        "problems": 500,
        "samples": 4,
        "avg@k": metric(accuracy),
        **{f"pass@{k}": metric(1 - (1 - accuracy) ** (1 + math.log2(k))) for k in (1, 2, 4)},
        "entropy": metric(entropy, 0.003),
        "length": metric(31.4159, 0.5),
        "distinct_1": metric(0.1),
        "distinct_2": metric(0.3),
        "forward_kl_teacher_text": metric(0.2 - accuracy / 10, 0.001),
        "reverse_kl_student_text": metric(0.25 - accuracy / 10, None),
    }


def write_run(path, *, accuracy=0.5, entropy=0.3, steps=40, text="1 + 1 = 2", nan_from=None, evaluate=True, samples=3):
    run = RunDirectory.create(path)
    run.write_recipe({"method": "gkd", "task": text, "signal": {"divergence": path.name}})
    run.write_objective(f"minimise {path.name}\nmean over scored tokens {text}")
    run.write_environment()
    for step in range(1, steps + 1):
        loss = math.nan if nan_from and step >= nan_from else 1 / step
        run.append_metrics({"step": step, "time": 0.1 * step, "loss": loss, "rollout/entropy": 0.3, "term/kl": loss})
    token = {"divergence": 0.1, "entropy": 0.2, "weight": 1.0, "scored": True, "route": "match"}
    top = {"teacher_top": [["2", 0.9], [EVIL, 0.1]], "student_top": [["2", 0.7], ["3", 0.2]]}
    run.append_samples(
        {
            "step": step,
            "prompt": text,
            "completion": text,
            "origin": "student",
            "rewards": {"accuracy": 1.0},
            "tokens": [{**token, **top, "text": piece} for piece in (text, "\n", "")],
        }
        for step in range(1, samples + 1)
    )
    if evaluate:
        both = {"untrained": metrics(0.3, 0.4), "teacher": metrics(0.95, 0.1)}
        run.write_evaluation({"student": metrics(accuracy, entropy), **both})
    return run


@pytest.fixture
def compared(tmp_path):
    """Six runs, two fields varied."""
    accuracies = {"forward_kl": (0.50, 0.60), "reverse_kl": (0.45, 0.70), "jsd": (0.55, 0.69)}
    runs = []
    for divergence, pair in accuracies.items():
        for fraction, accuracy in enumerate(pair):
            name = f"{divergence}-{fraction}"
            write_run(tmp_path / "compare" / name, accuracy=accuracy, entropy=0.1 + accuracy / 5)
            varied = {"signal.divergence": divergence, "source.student_fraction": float(fraction)}
            runs.append(
                {"directory": name, "label": f"{divergence}, {['off', 'on'][fraction]}-policy", "varied": varied}
            )
    vary = {"signal.divergence": list(accuracies), "source.student_fraction": [0.0, 1.0]}
    write_comparison(tmp_path / "compare", recipe="recipes/quickstart.yaml", vary=vary, runs=runs)
    return tmp_path / "compare"


class Page(HTMLParser):
    """The elements, attributes and visible text of a page."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.rows, self.scripts, self.text = [], [], [], ""
        self._cell = self._script = None
        self.feed(path.read_text(encoding="utf-8"))
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        self._cell = {"td": True, "th": True}.get(tag, self._cell)
        if tag == "script":
            self._script = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = None
        if tag == "script":
            self.scripts.append(self._script)
            self._script = None

    def handle_data(self, data):
        if self._script is not None:
            self._script += data
            return
        self.text += data
        if self._cell and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_the_numbers_of_the_table_are_those_of_evaluation_json(compared):
    page = Page(write_report([compared], compared / "report.html"))
    shown = {row[0].strip(): row[1:] for row in page.rows if len(row) == 8}
    rows = comparison_rows([compared])
    assert [row["label"] for row in rows][:2] == ["untrained", "teacher"]
    assert len(rows) == 8
    for row in rows:
        if row["kind"] == "run":
            stored = RunDirectory(row["path"]).evaluation()["student"]
        else:
            stored = RunDirectory(compared / "jsd-0").evaluation()[row["kind"]]
        for name, value in row["metrics"].items():
            assert value["value"] == (stored[name] if name in ("problems", "samples") else stored[name]["value"])
        cells = shown[row["label"]]
        for cell, (name, digits) in zip(
            cells,
            [("avg@k", 3), ("pass@4", 3), ("entropy", 3), ("length", 1), ("forward_kl_teacher_text", 3)],
            strict=False,
        ):
            value = stored[name]
            assert cell.strip() == f"{value['value']:.{digits}f} ± {value['standard_error']:.{digits}f}"
        assert "±" not in cells[5]  # no standard error was stored, so none is invented


def test_best_and_close_follow_the_standard_errors(compared):
    rows = {row["label"]: row for row in comparison_rows([compared])}
    assert "avg@k" in rows["reverse_kl, on-policy"]["best"]
    assert "avg@k" in rows["jsd, on-policy"]["close"]  # 0.01 apart, 0.028 is one standard error of the difference
    assert "avg@k" not in rows["forward_kl, on-policy"]["close"]
    assert not rows["teacher"]["best"]
    assert not rows["untrained"]["best"]
    assert "entropy" not in [name for row in rows.values() for name in row["best"]]  # no better end
    gain = rows["reverse_kl, on-policy"]["gain"]
    assert gain["value"] == pytest.approx(0.4)
    assert gain["standard_error"] == pytest.approx(0.02 * math.sqrt(2))


def test_the_terminal_table_fits_80_columns_and_says_the_same(compared):
    console = Console(width=80, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(comparison_table([compared]))
    text = captured.get()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "0.700" in text
    assert "±0.020" in text
    assert "untrained" in text
    assert "≈0.690" in text
    markdown = comparison_markdown([compared])
    assert "**0.700 ± 0.020**" in markdown
    assert markdown.count("\n") == 10


def test_rows_are_json(compared):
    assert json.loads(json.dumps(comparison_rows([compared]))) == comparison_rows([compared])


def test_the_page_is_one_small_file_that_asks_for_nothing(compared):
    out = write_report([compared], compared)
    assert out == compared / "report.html"
    assert out.stat().st_size < 1_000_000
    page = Page(out)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "img", "object")
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
    policy = next(a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", out.read_text())


def test_the_scripts_hash_in_the_policy_is_that_of_the_script(compared):
    import base64
    import hashlib

    page = Page(write_report([compared], compared))
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert any(f"'sha256-{digest}'" in a.get("content", "") for t, a in page.elements if t == "meta")


def test_a_long_comparison_stays_small(tmp_path):
    runs = []
    for i in range(6):
        run = write_run(tmp_path / f"r{i}", steps=1000, samples=0)
        tops = {side: [[f"tok{n}", 0.2] for n in range(5)] for side in ("teacher_top", "student_top")}
        token = {"divergence": 0.123456789, "entropy": 0.2345678, "weight": 1.0, "scored": True, **tops}
        run.append_samples(
            {
                "step": s,
                "prompt": "x" * 9000,
                "completion": "y",
                "tokens": [{"text": f"t{n}", **token} for n in range(200)],
            }
            for s in range(25)
        )
        runs.append(run.path)
    out = write_report(runs, tmp_path / "out" / "report.html")
    page = Page(out)
    assert out.stat().st_size < 1_000_000
    assert "144 of 150 samples" in page.text
    with_tokens = [sample["run"] for sample in page.data["samples"] if sample["tokens"]]
    assert set(with_tokens) == set(range(6))  # the budget is spent evenly


@pytest.mark.parametrize("evil", [EVIL, "\"'><svg onload=alert(1)>", "]]></style><b>", "\\u003c{{7*7}}${1}"])
def test_text_from_outside_stays_text(tmp_path, evil):
    run = write_run(tmp_path / "run", text=evil)
    run.write_environment({"command": [evil], evil: evil})
    row = {"step": 41, "time": 5.0, "loss": 0.1, f"probe/{evil}": 0.5}
    run.append_metrics(row)
    write_comparison(
        tmp_path, recipe=evil, vary={evil: [evil]}, runs=[{"directory": "run", "label": evil, "varied": {evil: evil}}]
    )
    clean = Page(write_report([write_run(tmp_path / "clean").path], tmp_path / "clean.html"))
    page = Page(write_report([tmp_path], tmp_path / "report.html", title=evil))

    assert len(page.scripts) == 2
    assert page.scripts[1] == clean.scripts[1]
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in clean.elements} | {"p", "code", "b"}
    assert not any(
        tag in ("img", "svg", "b") and not attributes.get("class") for tag, attributes in page.elements if tag != "b"
    )
    for character in "<>&\u2028\u2029":
        assert character not in page.scripts[0]
    strings = page.data["strings"]
    assert evil in strings
    assert page.data["runs"][0]["label"] == evil
    assert page.text.count(evil) >= 4  # title, label, samples, recipe: shown as it is


def test_a_terminal_label_is_no_markup(tmp_path):
    write_run(tmp_path / "run")
    write_comparison(tmp_path, recipe="", vary={}, runs=[{"directory": "run", "label": "[red]x[/] [/nope]"}])
    console = Console(width=120)
    with console.capture() as captured:
        console.print(comparison_table([tmp_path], title="[/bad]"))
    assert "[red]x[/] [/nope]" in captured.get()


def test_a_diverged_run_is_shown_as_such(tmp_path):
    run = write_run(tmp_path / "run", nan_from=21)
    out = write_report([run.path], tmp_path / "r.html")
    page = Page(out)
    assert "diverged: its loss was not a finite number from step 21 on" in page.text
    assert comparison_rows([run.path])[-1]["status"] == "diverged at step 21"
    loss = next(curve for curve in page.data["curves"] if curve["key"] == "loss")["series"][0]
    assert loss["y"][-1] is None
    assert loss["y"][0] == 1.0
    assert page.data["runs"][0]["diverged"] == 21


def test_a_nan_that_passes_is_no_divergence(tmp_path):
    run = write_run(tmp_path / "run", steps=0)
    for step, loss in enumerate([1.0, math.nan, math.inf, 0.5], start=1):
        run.append_metrics({"step": step, "loss": loss})
    (data,) = load_runs(run.path).runs
    assert data.diverged_at is None
    assert data.status == "evaluated"


def test_metrics_that_are_not_finite_do_not_break_the_page(tmp_path):
    run = write_run(tmp_path / "run")
    broken = metrics(math.nan, math.inf)
    run.write_evaluation({"student": broken, "teacher": metrics(0.9, 0.1)})
    other = write_run(tmp_path / "other", accuracy=0.6)
    out = write_report([run.path, other.path], tmp_path / "r.html")
    assert "NaN ± 0.020" in Page(out).text
    rows = comparison_rows([run.path, other.path])
    assert rows[-1]["best"]
    assert "avg@k" not in rows[-2]["best"]


FILES = ["recipe.yaml", "objective.txt", "environment.json", "metrics.jsonl", "samples.jsonl", "evaluation.json"]


@pytest.mark.parametrize("file", FILES)
def test_each_file_may_be_missing(tmp_path, file):
    run = write_run(tmp_path / "run")
    (run.path / file).unlink()
    page = Page(write_report([run.path], tmp_path / "r.html"))
    assert f"there is no {file}, so what it holds is left out" in page.text


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_each_file_may_be_cut_short(tmp_path, file, share):
    run = write_run(tmp_path / "run")
    content = (run.path / file).read_bytes()
    (run.path / file).write_bytes(content[: int(share * len(content))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        page = Page(write_report([run.path], tmp_path / "r.html"))
        comparison_table([run.path])
    assert "Result" in page.text


def test_a_run_before_its_first_step_has_a_report_too(tmp_path):
    run = RunDirectory.create(tmp_path / "run")
    run.write_recipe({"method": "sft"})
    page = Page(write_report([run.path], tmp_path / "r.html"))
    assert "Nothing was evaluated yet" in page.text
    assert page.data["curves"] == page.data["samples"] == []


def test_samples_without_tokens_and_tokens_without_tops(tmp_path):
    run = write_run(tmp_path / "run", samples=0)
    run.append_samples(
        [{"step": 1, "prompt": "p", "completion": "only text"}, {"step": 2, "tokens": [{"text": "t"}]}, {}]
    )
    first, second, third = Page(write_report([run.path], tmp_path / "r.html")).data["samples"]
    assert first["completion"] == "only text"
    assert first["tokens"] is None
    assert third["tokens"] is None
    assert second["tokens"] == [[0, None, None, None, 1, None, [], []]]


OBJECTIVE = """\
minimise   policy + 0.5 * key
policy: policy gradient, ratio clipped to [0.8, 1.28]; mean over trained tokens of the step
key: forward_kl = sum hinted log(hinted / student), T = 1; value: exact; mean over trained tokens of the step"""


def write_routed(path, texts, objective=OBJECTIVE):
    """A run whose samples have tokens (text, route)."""
    run = write_run(path, samples=0)
    run.write_objective(objective)
    run.append_samples(
        {
            "step": 0,
            "prompt": "p",
            "completion": "".join(text for text, _ in tokens if text != "<end>"),
            "tokens": [{"text": text, "route": route} for text, route in tokens],
        }
        for tokens in texts
    )
    return run.path


def routed_pieces(out):
    """(class, text) of the coloured pieces of each completion in the table of samples, and the legend's rows."""
    rows = re.findall(r'<tr data-run="\d+"><td class="narrow">.*?</tr>', out.read_text())
    pieces = [re.findall(r'<span class="r(\d)" title="[^"]*">(.*?)</span>', row.split("<pre>")[2]) for row in rows]
    legend = re.findall(
        r'<th scope="row"><span class="r(\d)">(.*?)</span>.*?</th><td>(.*?)</td><td>(.*?)</td>', out.read_text()
    )
    return [[(int(number), text) for number, text in row] for row in pieces], legend


def test_the_routes_of_all_samples_are_coloured_and_explained(tmp_path):
    first = [("2", "policy"), ("+", "policy"), ("5", "policy + key"), ("<end>", "policy")]
    second = [("9", "key"), ("-", "none"), ("4", "policy"), ("<end>", "policy")]
    out = write_report([write_routed(tmp_path / "run", [first, second])], tmp_path / "r.html")
    pieces, legend = routed_pieces(out)
    assert pieces == [
        [(0, "2+"), (1, "5"), (0, "&lt;end&gt;")],
        [(2, "9"), (3, "-"), (0, "4&lt;end&gt;")],
    ]
    words = "policy: policy gradient, ratio clipped to [0.8, 1.28]"
    key = "key: forward_kl = sum hinted log(hinted / student), T = 1"
    assert legend == [
        ("0", "policy", words, "62.5%"),
        ("1", "policy + key", f"{words}<br>{key}", "12.5%"),
        ("2", "key", key, "12.5%"),
        ("3", "none", "no term trains these tokens", "12.5%"),
    ]
    data = Page(out).data
    assert [route["name"] for route in data["routes"]] == ["policy", "policy + key", "key", "none"]
    assert [[token[5] for token in sample["tokens"]] for sample in data["samples"]] == [[0, 0, 1, 0], [2, 3, 0, 0]]


def test_one_name_with_two_divergences_is_two_routes(tmp_path):
    both = [("2", "policy"), ("5", "key")]
    other = OBJECTIVE.replace("forward_kl = sum hinted log(hinted / student)", "tv = 1/2 sum |hinted - student|")
    runs = [write_routed(tmp_path / "a", [both]), write_routed(tmp_path / "b", [both], other)]
    pieces, legend = routed_pieces(write_report(runs, tmp_path / "r.html"))
    assert pieces == [[(0, "2"), (1, "5")], [(0, "2"), (2, "5")]]
    assert [words for number, _, words, _ in legend if number == "2"] == ["key: tv = 1/2 sum |hinted - student|, T = 1"]


def test_routes_are_told_apart_only_where_there_are_two(tmp_path):
    run = write_routed(tmp_path / "run", [[("2", "policy"), ("5", "policy")], [("7", "policy")]])
    pieces, legend = routed_pieces(write_report([run], tmp_path / "r.html"))
    assert pieces == [[], []]
    assert not legend


def test_a_character_in_several_tokens_keeps_its_completion(tmp_path):
    path = write_routed(tmp_path / "run", [[("a", "policy"), ("b", "key")]])
    cut = {"step": 1, "completion": "é", "tokens": [{"text": "\ufffd", "route": r} for r in ("policy", "key")]}
    RunDirectory(path).append_samples([cut])
    out = write_report([path], tmp_path / "r.html")
    assert routed_pieces(out)[0] == [[(0, "a"), (1, "b")], []]
    assert "<pre>é</pre>" in out.read_text()


def test_names_and_texts_of_routes_stay_text(tmp_path):
    path = write_routed(tmp_path / "run", [[(EVIL, EVIL), ("2", "key")]], f"{EVIL}: {EVIL}")
    page = Page(write_report([path], tmp_path / "r.html"))
    assert len(page.scripts) == 2
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in page.elements)
    assert page.data["routes"][0]["name"] == EVIL


def test_a_long_routed_completion_is_cut(tmp_path):
    long = [("x" * 700, "policy"), ("y" * 700, "key"), ("z", "policy")]
    out = write_report([write_routed(tmp_path / "run", [long])], tmp_path / "r.html")
    assert routed_pieces(out)[0] == [[(0, "x" * 700), (1, "y" * 500)]]
    assert "y</span> … (1,401 characters in samples.jsonl)</pre>" in out.read_text()


def test_runs_from_different_places_keep_their_own_anchors(tmp_path):
    a, b = write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run")
    both = {"untrained": metrics(0.2, 0.5), "teacher": metrics(0.95, 0.1)}
    b.write_evaluation({"student": metrics(0.6, 0.2), **both})
    labels = [row["label"] for row in comparison_rows([a.path, b.path])]
    assert labels == ["untrained (a/run)", "untrained (b/run)", "teacher", "a/run", "b/run"]


def test_a_run_of_the_comparison_that_is_gone_is_said(compared):
    import shutil

    shutil.rmtree(compared / "jsd-1")
    page = Page(write_report([compared], compared))
    assert "jsd, on-policy: there is no directory jsd-1." in page.text
    assert len(page.data["runs"]) == 5


def test_what_is_no_run_is_refused_in_one_sentence(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ValueError, match=rf"runs={path}: [^\n]+"):
            write_report([path], tmp_path / "r.html")
    with pytest.raises(ValueError, match="name at least one run"):
        comparison_rows([])


def test_a_grid_of_two_fields_shares_colours_and_dashes(compared):
    looks = styles(load_runs(compared).runs)
    assert [look.color for look in looks] == [0, 0, 1, 1, 2, 2]
    assert [look.dash for look in looks] == [0, 1] * 3


def test_many_runs_have_different_looks(tmp_path):
    runs = [write_run(tmp_path / f"r{i}", steps=1, samples=0).path for i in range(20)]
    assert len(set(styles(load_runs(runs).runs))) == 20


def test_smoothing_keeps_constants_and_lines_and_gaps():
    assert smoothed([2.0] * 100) == pytest.approx([2.0] * 100)
    line = [0.5 * i for i in range(200)]
    assert smoothed(line)[50:150] == pytest.approx(line[50:150])  # centred: no lag
    gap = smoothed([1.0, math.nan, 1.0, math.inf] * 20)
    assert [math.isnan(value) for value in gap] == [False, True, False, True] * 20
    assert smoothed([]) == []
    assert smoothed([3.0]) == [3.0]


def test_figures_are_drawn_and_reproducible(compared, tmp_path):
    for kind in ("png", "svg"):
        assert figures.accuracy_entropy(compared, tmp_path / f"a.{kind}").stat().st_size > 5000
        assert figures.pass_at_k([compared], tmp_path / f"p.{kind}").stat().st_size > 5000
        assert figures.curve(compared, "loss", tmp_path / f"c.{kind}").stat().st_size > 5000
    again = figures.accuracy_entropy(compared, tmp_path / "again.svg")
    assert again.read_bytes() == (tmp_path / "a.svg").read_bytes()
    assert "reverse_kl, on-policy" in again.read_text()
    with pytest.raises(ValueError, match=r"key='los': no run has logged it; logged are loss"):
        figures.curve(compared, "los", tmp_path / "x.png")


def test_figures_from_plain_numbers(tmp_path):
    figures.lines({"a": ([1, 2, 4], [0.1, 0.2, 0.3], [0.01, None, 0.02])}, tmp_path / "l.svg", x_label="k", y_label="y")
    figures.points({"a": (1.0, (2.0, 0.1)), "b": ((1, None), 3)}, tmp_path / "p.svg", x_label="x", y_label="y")
    assert "svg" in (tmp_path / "l.svg").read_text()
    assert (tmp_path / "p.svg").is_file()
