"""What cannot work is refused before anything is loaded, and the objective is said in words."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kullback.lm import Batch, Distillation, Method, answer, find_method, match, sources
from kullback.lm.engine import Engine, with_fields
from kullback.lm.rehearse import objective, rehearse
from kullback.lm.schedules import EntropyGate
from kullback.run.controllers import Ramp
from kullback.run.terms import Term
from tests.lm.small import make, make_moment


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("on_policy_distillation", {"divergence": "jsd(1.5)"}, "beta must be"),
        ("on_policy_distillation", {"divergence": "reverse_kll"}, "did you mean .*reverse_kl"),
        (
            "on_policy_distillation",
            {"student_fraction": 0.5, "route": "link"},
            "right only for tokens the student sampled",
        ),
        (
            "on_policy_distillation",
            {"student_fraction": 1.0, "route": "link", "sampling_temperature": 0.5},
            "draws from another distribution",
        ),
        ("on_policy_distillation", {"top_k": 4, "temperature": 2.0}, "cannot soften"),
        ("vopd", {"top_k": 4}, r"set signal\.baseline=none"),
        ("vopd", {"baseline": 0}, "write exact, none, or how many"),
        ("sft", {"samples": 4}, r"source\.samples=4 would do nothing"),
        ("word_kd", {"sampling_temperature": 0.5}, "would do nothing: no model writes text here"),
        ("word_kd", {"aggregate": "mean"}, "write token, row or row_sum"),
        ("word_kd", {"cache": "somewhere"}, r"say how many with target\.top_k"),
        ("sequence_kd", {"sampling_temperature": -1.0}, "must be at least 0"),
    ],
)
def test_refusals(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rehearse(make(name, **changes))


def test_out_of_range_fields_are_refused_when_made() -> None:
    for name, changes, message in (
        ("gkd", {"beta": 1.5}, r"signal\.beta=1\.5 must be between 0"),
        ("word_kd", {"mix": 1.0}, r"use method: sft"),
        ("four_cells", {"minimum_entropy": 0.3}, r"would do nothing without schedule\.lengths"),
        ("on_policy_distillation", {"student_fraction": 2.0}, r"must be between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make(name, **changes)


@dataclass(frozen=True, kw_only=True)
class Odd(Distillation):
    """Wrong in a way that the test chooses."""

    wrong: str = answer("signal", "")

    def source(self) -> sources.Source:
        return sources.student()

    def weight(self, step: Batch) -> dict[str, torch.Tensor]:
        return {"w": torch.zeros(3)} if self.wrong == "shape" else {}

    def signal(self, batch: Batch) -> list[Term]:
        value = batch.model.log_probs()
        if self.wrong == "none":
            return []
        if self.wrong == "detached":
            return [Term("t", value.detach())]
        if self.wrong == "nan":
            return [Term("t", value * torch.nan)]
        if self.wrong == "column":
            return [Term("t", value * batch["missing"])]
        if self.wrong == "shape":
            return [Term("t", value, weight="w")]
        return [match("reverse_kl", batch, coefficient=0.0)]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("none", ValueError, "there is nothing to minimise"),
        ("detached", ValueError, "has no gradient in the student"),
        ("nan", ValueError, "the objective is nan"),
        ("column", KeyError, "column 'missing' does not exist; this step has rows, scored"),
        ("shape", ValueError, "weight='w' has shape"),
        ("zero", ValueError, "gradient is zero"),
    ],
)
def test_a_wrong_method_of_one_s_own_is_found(wrong: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rehearse(Odd(teacher="given", wrong=wrong))


def test_schedules_of_unknown_fields_are_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule\.signal\.beta: this method has no such field"):
        rehearse(make("word_kd"), (Ramp("signal.beta", 0.0, 1.0, 5),))


def test_the_objective_says_direction_scale_temperature_support_route_and_normaliser() -> None:
    method = make("on_policy_distillation", divergence="jsd(0.1)", student_fraction=1.0, temperature=2.0)
    words = objective(method, rehearse(method))
    for part in (
        "jsd(0.1)",
        "teacher",
        "student",
        "T = 2",
        "full vocabulary",
        "pathwise",
        "mean over scored tokens",
        "text the student writes",
    ):
        assert part in words


def test_methods_are_found_by_name_by_file_and_refused_kindly(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"did you mean .*vopd"):
        find_method("vodp")
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from kullback.lm import Method, sources\n"
        "from kullback.run.terms import Term\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(Method):\n"
        "    def source(self): return sources.dataset()\n"
        "    def signal(self, batch): return [Term('t', -batch.model.log_probs())]\n"
    )
    assert rehearse(find_method(str(tmp_path / "mine.py"))())[0].name == "t"
    assert find_method(f"{tmp_path / 'mine.py'}:Mine").__name__ == "Mine"
    with pytest.raises(ValueError, match="no file"):
        find_method("nowhere.py")


def test_controllers_write_into_the_method() -> None:
    method = make("word_kd")
    assert with_fields(method, {"signal.temperature": 1.5, "source.max_completion": 7.6}).max_completion == 8
    engine = Engine(method, make_moment(method), controllers=(Ramp("signal.temperature", 2.0, 1.0, 4),))
    seen = []
    for step in range(6):
        engine.prepare(step)
        seen.append(engine.at.method.temperature)  # type: ignore[attr-defined]
    assert seen == [2.0, 1.75, 1.5, 1.25, 1.0, 1.0]


def test_the_entropy_gate_climbs_until_entropy_falls_and_never_again() -> None:
    gate = EntropyGate((4, 8, 16, 32), minimum_entropy=0.5)
    state, values = gate.start()
    assert values == {"source.max_completion": 4.0}
    lengths = []
    for entropy in (0.9, 0.6, 0.4, 0.9, 0.9):
        state, values = gate.update(state, 0, {"probe/entropy": entropy})
        lengths.append(values["source.max_completion"])
    assert lengths == [8.0, 16.0, 16.0, 16.0, 16.0]
    with pytest.raises(ValueError, match="increasing"):
        EntropyGate((8, 4), 0.5)


def test_the_gate_cuts_what_is_written() -> None:
    method = make("four_cells", lengths=(3, 6), minimum_entropy=0.1, max_completion=6)
    engine = Engine(method, make_moment(method))
    assert engine.prepare(0)[0].rollout.completions.shape[1] <= 3
    engine.seen["probe/entropy"] = 1.0
    engine.control("probe", 1)
    assert engine.at.method.max_completion == 6
    engine.seen["probe/entropy"] = 0.0
    state = engine.state()
    again = Engine(method, make_moment(method))
    again.restore(state)
    assert again.at.method.max_completion == 6


def test_every_field_of_every_method_answers_a_question() -> None:
    for kind in (Method, Distillation, Odd):
        for item in dataclasses.fields(kind):
            assert item.metadata["question"] in ("source", "target", "signal", "weight", "schedule")
