"""`kb.train` from loaded objects: what it leaves behind, what it refuses, and what stops it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import kullback as kb
from kullback.lm.players import Lazy
from kullback.lm.tiny import build, save
from tests.lm.small import ROWS, build_tokenizer, random_model

QUICK: dict[str, Any] = {"steps": 3, "prompts_per_step": 4, "learning_rate": 1e-2, "evaluate": {"problems": 0}}


def distil(output: Path, **changes: Any) -> Any:
    options: dict[str, Any] = QUICK | {
        "max_completion": 10,
        "student": random_model(1),
        "teacher": random_model(2),
        "tokenizer": build_tokenizer(),
    }
    return kb.train("on_policy_distillation", output=output, **({"data": ROWS} | options | changes))


def test_a_run_directory_is_whole(tmp_path: Path) -> None:
    data = {"data": ROWS, "held_out": 8}
    run = distil(
        tmp_path / "run",
        data=data,
        evaluate={"problems": 6, "samples": 2, "divergence_problems": 3, "shown": 2, "probe_every": 2},
    )
    assert [row["step"] for row in run.metrics] == [1, 2, 3]
    assert {"loss", "gradient_norm", "term/match/teacher", "rollout/length", "tokens"} <= run.metrics[0].keys()
    assert "probe/entropy" in run.metrics[1]
    for file in (
        "recipe.yaml",
        "objective.txt",
        "environment.json",
        "metrics.jsonl",
        "samples.jsonl",
        "evaluation.json",
        "report.html",
    ):
        assert (tmp_path / "run" / file).stat().st_size > 0
    graded = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert graded.keys() == {"student", "untrained", "teacher"}
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(trained(ids).logits, run.student.eval()(ids).logits)


def test_the_loss_of_the_log_is_the_sum_of_its_terms(tmp_path: Path) -> None:
    run = kb.train(
        "word_kd", student=random_model(1), teacher=random_model(2), tokenizer=build_tokenizer(), data=ROWS,
        output=tmp_path / "run", mix=0.25, micro_batches=2, max_completion=50, **QUICK,
    )  # fmt: skip
    for row in run.metrics:
        assert row["loss"] == pytest.approx(0.75 * row["term/match/teacher"] + 0.25 * row["term/nll"], rel=1e-4)


def test_training_lowers_the_divergence(tmp_path: Path) -> None:
    run = distil(tmp_path / "run", steps=40, prompts_per_step=16)
    first, last = (sum(row["loss"] for row in rows) / 5 for rows in (run.metrics[:5], run.metrics[-5:]))
    assert last < 0.7 * first


def test_models_are_loaded_from_directories(tmp_path: Path) -> None:
    for name, seed in (("student", 1), ("teacher", 2)):
        save(random_model(seed), build_tokenizer(), tmp_path / name)
    run = distil(tmp_path / "run", student=str(tmp_path / "student"), teacher=str(tmp_path / "teacher"), tokenizer=None)
    loaded = distil(tmp_path / "loaded")
    assert [row["loss"] for row in run.metrics] == pytest.approx([row["loss"] for row in loaded.metrics], rel=1e-4)


def test_a_cached_teacher_is_never_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(random_model(2), build_tokenizer(), tmp_path / "teacher")
    options: dict[str, Any] = {
        "student": random_model(1),
        "teacher": str(tmp_path / "teacher"),
        "tokenizer": build_tokenizer(),
        "data": ROWS,
        "top_k": 6,
        "cache": str(tmp_path / "cache"),
        "max_completion": 50,
    }
    first = kb.train("word_kd", output=tmp_path / "first", **(options | {"student": random_model(1)}), **QUICK)

    def refuse(self: Any) -> Any:
        raise AssertionError("the teacher was asked for")

    monkeypatch.setattr(Lazy, "get", refuse)
    second = kb.train("word_kd", output=tmp_path / "second", **(options | {"student": random_model(1)}), **QUICK)
    assert [row["loss"] for row in second.metrics] == [row["loss"] for row in first.metrics]


def test_lora_trains_adapters_alone(tmp_path: Path) -> None:
    base = random_model(1)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    run = distil(tmp_path / "run", student=base, lora={"rank": 2, "alpha": 4})
    trained = {name for name, p in run.student.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)
    for name, value in run.student.base_model.model.state_dict().items():
        if "lora" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")])
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").is_file()


def test_a_new_student_is_made_from_its_sizes(tmp_path: Path) -> None:
    sizes = {"architecture": "qwen3", "hidden_size": 16, "layers": 1, "heads": 2}
    run = kb.train("sft", student=sizes, data=ROWS, output=tmp_path / "run", max_completion=50, **QUICK)
    model, _ = build(sizes)
    assert sum(p.numel() for p in run.student.parameters()) == sum(p.numel() for p in model.parameters())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """Weights that overflow in the first update; the log keeps what came before."""
    with pytest.raises((ValueError, FloatingPointError), match=r"NaN while sampling|the loss is nan"):
        distil(tmp_path / "run", learning_rate=1e30, max_grad_norm=0.0)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 3}, "stepz=3: no such setting of OnPolicyDistillation; did you mean steps"),
        ({"steps": 0}, "steps=0: input should be greater than 0"),
        ({"divergence": "revers_kl"}, "did you mean .*reverse_kl"),
        ({"tokenizer": None}, "a loaded student needs its tokenizer"),
        ({"student": "/no/such/model"}, "student='/no/such/model' cannot be loaded"),
        ({"teacher": "/no/such/model"}, r"target\.teacher='/no/such/model' cannot be loaded"),
        ({"max_prompt": 3}, r"its prompt has \d+ tokens, source\.max_prompt is 3"),
        ({"max_completion": 4000}, "exceed the student's context of 128; set source.max_completion to at most"),
        ({"schedule": {"signal.temperature": "soon"}}, "is not understood"),
        ({"evaluate": {"problem": 3}}, "problem"),
    ],
)
def test_bad_input_is_one_sentence(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        distil(tmp_path / "run", **changes)
    assert "\n" not in str(caught.value)


def test_another_tokenizer_of_a_named_teacher_is_refused(tmp_path: Path) -> None:
    other = build_tokenizer()
    other.add_tokens(["new"])
    save(random_model(2), other, tmp_path / "teacher")
    with pytest.raises(ValueError, match="its tokenizer is not the student's: token 'new'"):
        distil(tmp_path / "run", teacher=str(tmp_path / "teacher"))


def test_a_finished_run_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    distil(tmp_path / "run")
    with pytest.raises(ValueError, match="output"):
        distil(tmp_path / "run")
    assert distil(tmp_path / "run", overwrite=True).metrics[-1]["step"] == 3


def test_a_divergence_may_be_given_as_an_object(tmp_path: Path) -> None:
    by_name = distil(tmp_path / "name", divergence="0.5*forward_kl + 0.5*reverse_kl")
    by_object = distil(
        tmp_path / "object", divergence=0.5 * kb.divergence("forward_kl") + 0.5 * kb.divergence("reverse_kl")
    )
    assert [row["loss"] for row in by_name.metrics] == [row["loss"] for row in by_object.metrics]
    mine = kb.FDivergence.from_generator(lambda u: (u - 1) ** 2, name="nobody_knows_me")
    with pytest.raises(
        ValueError, match=r"divergence=nobody_knows_me: this name is not known; kb\.divergence\.register it"
    ):
        distil(tmp_path / "mine", divergence=mine)


def test_no_checkpoint_in_the_middle_of_a_draw(tmp_path: Path) -> None:
    """Three steps on each draw, a checkpoint every two: it waits for the draw, and a resumed run repeats the whole."""
    options: dict[str, Any] = {
        "student": random_model(1), "tokenizer": build_tokenizer(), "data": ROWS, "samples": 2, "max_completion": 6,
        "updates": 3, "save_every": 2, "penalty": 0.1, "prompts_per_step": 2, "evaluate": {"problems": 0},
    }  # fmt: skip
    whole = kb.train("ppo", output=tmp_path / "whole", steps=9, **options)
    saved = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "whole" / "checkpoints").glob("checkpoint-*"))
    assert saved
    assert all(step % 3 == 0 for step in saved)
    part = {**options, "student": random_model(1)}
    kb.train("ppo", output=tmp_path / "part", steps=6, lr_schedule="constant", **part)
    resumed = kb.train("ppo", output=tmp_path / "part", steps=9, resume=True, **(part | {"student": random_model(1)}))
    assert [row["loss"] for row in resumed.metrics] == [row["loss"] for row in whole.metrics]
