"""TRACE (paper 16): the checks of its card, annotators that fail, and where their spans land."""

import json
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kullback.divergence import divergence
from kullback.lm import annotators, readers, targets
from kullback.lm.annotators import Asked, Endpoint, Player, Rule, annotator, read_annotation
from kullback.lm.engine import Engine
from kullback.lm.method import Method, find_method
from kullback.lm.moment import Moment
from kullback.lm.players import copy_weights
from kullback.lm.predictions import LogitPredictions
from kullback.lm.signals import clipped_sum
from tests.lm.small import gradient, make, make_moment

TRACE = find_method("trace")
FKL, RKL = divergence("forward_kl"), divergence("reverse_kl")


def first_three(problem: str, response: str, correct: bool) -> dict[str, Any]:
    return {"spans": [[0, min(3, len(response))]], "label": "sum"}


class Judged:
    """A verifier that accepts every other response: an untrained student is never right."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, problem: Any, completion: str) -> dict[str, float]:
        self.calls += 1
        return {"accuracy": float(self.calls % 2)}


def moment(method: Method, **options: Any) -> Moment:
    at = make_moment(method, **options)
    at.task.verifier = Judged()
    return at


def trace(**changes: Any) -> Any:
    changes = {"rewards": None, "key": "forward_kl", "error": None, "annotator": first_three, "cap": 1.0, **changes}
    return make("trace", **changes)


def test_the_schedule_of_the_card() -> None:
    method = trace()
    engine, seen = Engine(method, moment(method)), {}
    for step in range(60):
        engine.control("step", step)
        seen[step] = engine.at.method.kl * engine.at.method.fade, 1 - engine.at.method.fade
    assert all(seen[k] == (0.5, 0.0) for k in range(11))
    assert seen[25] == pytest.approx((0.25, 0.5))
    assert all(seen[k] == (0.0, 1.0) for k in range(40, 60))


def plain_grpo() -> tuple[float, torch.Tensor]:
    method = make("grpo", rewards=None, samples=2, scale="group", correction=None, redraws=0, reference=None,
                  penalty=0.0, horizon="token", aggregate="row")  # fmt: skip
    return gradient(Engine(method, moment(method)))


@pytest.mark.parametrize(
    "changes",
    [
        {"kl": 0.0},
        {"annotator": lambda *_: {"spans": [], "label": "none"}},
        {"fade": 0.0, "decay": None},
        {"annotator": lambda *_: 1 / 0},
        {"annotator": lambda _, response, __: {"spans": [[0, len(response) + 1]], "label": "outside"}},
    ],
    ids=["no weight", "no spans", "after the fade", "a reader that raises", "spans outside"],
)
@pytest.mark.filterwarnings("ignore:step")
def test_without_spans_it_is_grpo_bit_for_bit(changes: dict[str, Any]) -> None:
    loss, whole = plain_grpo()
    method = trace(**changes)
    other_loss, other = gradient(Engine(method, moment(method)))
    assert float(whole.abs().max()) > 1e-4
    assert other_loss == loss
    assert torch.equal(other, whole)


def test_after_the_fade_nobody_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    method = trace(annotator=lambda *_: pytest.fail("asked"))
    engine = Engine(method, moment(method))
    engine.at.players.pop("hinted")
    (micro,) = engine.prepare(40)
    assert float(engine.loss(micro)) == float(engine.loss(micro))
    assert engine.targets == {}
    assert engine.at.method.after(50) == []


def test_the_loss_of_the_card_term_by_term() -> None:
    method = trace(error="reverse_kl", fade=0.4, decay=None)
    at = moment(method, dtype=torch.float64)
    engine = Engine(method, at)
    (micro,) = engine.prepare(0)
    loss = engine.loss(micro)
    rollout, accuracy = micro.rollout, micro.rollout.rewards["accuracy"]
    student, hinted = at.model("student"), at.model("hinted")
    advantage, total = micro["advantage"], torch.zeros((), dtype=torch.float64)
    for row in range(len(rollout)):
        length, note = int(rollout.lengths[row]), rollout.notes[row]
        y = rollout.completions[row, :length]

        def law(model: Any, prompt: list[int], y: torch.Tensor = y, length: int = length) -> torch.Tensor:
            ids = torch.cat([torch.tensor(prompt), y])[None]
            return model(ids).logits[0, len(prompt) - 1 : len(prompt) - 1 + length].log_softmax(-1)

        p = law(student, rollout.prompts[row])
        turns = [{"role": "user", "content": f"{note['messages'][-1]['content']} sum"}]
        text = at.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        q = law(hinted, at.tokenizer(text, add_special_tokens=False)["input_ids"])
        right = accuracy[row] == 1
        D = (q.exp() * (q - p)).sum(-1) if right else (p.exp() * (p - q)).sum(-1)
        chosen = torch.zeros(length, dtype=torch.bool)
        chosen[note.get("marked", [])] = True
        g = -advantage[row, :length]  # the ratio is 1
        total = total + ((1 - 0.4 * chosen) * g + 0.5 * 0.4 * chosen * D).sum() / length
    torch.testing.assert_close(loss.double(), total / len(rollout), rtol=1e-5, atol=1e-6)
    seen = engine.metrics()
    assert seen["rollout/key"] > 0
    assert seen["rollout/error"] > 0


def test_forward_kl_on_right_rows_only_and_reverse_kl_on_wrong_ones() -> None:
    for changes, wanted in (({}, 1.0), ({"key": None, "error": "reverse_kl"}, 0.0)):
        method = trace(**changes)
        step = Engine(method, moment(method)).draw()
        name = "key" if wanted else "error"
        assert step[name].any()
        assert set(step.rollout.rewards["accuracy"][step[name].any(1)].tolist()) == {wanted}
        forged = replace(step.rollout, notes=[{**n, "marked": [0], "label": "x"} for n in step.rollout.notes])
        columns = method.weight(replace(step, rollout=forged))
        assert set(forged.rewards["accuracy"][columns[name].any(1)].tolist()) == {wanted}


def test_a_row_whose_verifier_failed_trains_nothing() -> None:
    method = trace(error="reverse_kl")
    at = moment(method)
    at.task.verifier = lambda problem, text: {"accuracy": math.nan if len(text) % 3 == 0 else float(len(text) % 2)}
    step = Engine(method, at).draw()
    unknown = step.rollout.rewards["accuracy"].isnan()
    assert 0 < int(unknown.sum()) < len(unknown)
    assert not (step["trained"] | step["key"] | step["error"])[unknown].any()
    assert torch.equal(step["trained"][~unknown], step["scored"][~unknown])


def test_groups_of_equal_reward_keep_their_divergence() -> None:
    method = trace()
    at = moment(method)
    at.task.verifier = lambda problem, completion: {"accuracy": 1.0}
    engine = Engine(method, at)
    _, whole = gradient(engine)
    assert not engine.step_batch["advantage"].any()  # type: ignore[index]
    assert float(whole.abs().max()) > 1e-3


def test_the_teacher_that_is_the_student_and_reads_no_label_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    method = trace()
    at = moment(method, dtype=torch.float64)
    copy_weights(at.model("student"), at.model("hinted"), 1.0)
    monkeypatch.setattr(targets.FrozenTarget, "prompts", lambda self, rollout, at: rollout.prompts)
    at.task.verifier = lambda problem, completion: {"accuracy": 1.0}
    engine = Engine(method, at)
    _, whole = gradient(engine)
    assert float(whole.abs().max()) < 1e-10
    assert abs(engine.metrics()["term/key"]) < 1e-10


def test_only_the_label_reaches_the_teacher() -> None:
    method = trace()
    at = moment(method)
    rollout = Engine(method, at).draw().rollout
    target = method.targets()["hinted"]
    before = target.prompts(rollout, at)

    def prompts(**changes: Any) -> list[list[int]]:
        return target.prompts(replace(rollout, notes=[{**note, **changes} for note in rollout.notes]), at)

    assert prompts(marked=[5], spans=[[7, 9]], failed="secret", answer="42") == before
    assert prompts(label="other") != before


def test_a_copy_reaches_the_next_reading() -> None:
    method = trace()
    at = moment(method)
    engine = Engine(method, at)
    rollout = engine.draw().rollout
    at.forwards.begin(keep={"hinted"})
    target = method.targets()["hinted"]
    first = target.predict(rollout, at).log_probs()
    assert torch.equal(target.predict(rollout, at).log_probs(), first)
    assert engine.after(9) == []
    assert torch.equal(target.predict(rollout, at).log_probs(), first)
    engine.after(10)
    second = target.predict(rollout, at)
    fresh = make_moment(method)
    fresh.players["hinted"] = at.model("student")
    assert not torch.allclose(second.log_probs(), first)
    torch.testing.assert_close(second.log_probs(), target.predict(rollout, fresh).log_probs())
    assert set(engine.state()["players"]) == {"hinted"}


LOGITS = st.integers(2, 7).flatmap(lambda n: st.tuples(*[st.lists(st.floats(-8, 8), min_size=n, max_size=n)] * 2))


def clipped(D: Any, q: Any, p: Any, limit: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    leaf = torch.as_tensor(p, dtype=torch.float64)[None].requires_grad_()
    one = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, dtype=torch.long)
    value, cut = clipped_sum(D, LogitPredictions(*one, torch.as_tensor(q, dtype=torch.float64)[None]),
                             LogitPredictions(*one, leaf), limit)  # fmt: skip
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    return value[0].detach(), grad[0], cut[0]


@given(pair=LOGITS)
def test_both_gradients_and_what_the_clip_makes_of_them(pair: Any) -> None:
    q, p = (torch.tensor(one, dtype=torch.float64).log_softmax(-1) for one in pair)
    value, grad, cut = clipped(FKL, q, p, 1e9)
    torch.testing.assert_close(grad, p.exp() - q.exp())
    torch.testing.assert_close(value, FKL.categorical(q, p))
    assert cut == 0
    value, grad, _ = clipped(RKL, q, p, 1e9)
    kl = (p.exp() * (p - q)).sum()
    torch.testing.assert_close(grad, p.exp() * (p - q - kl))
    torch.testing.assert_close(value, kl)
    _, grad, cut = clipped(FKL, q, p, 0.05)
    left = q.exp() * (q - p) <= 0.05
    torch.testing.assert_close(grad, p.exp() * q.exp()[left].sum() - q.exp() * left)
    assert cut == (~left).sum()


def test_the_numbers_of_the_card() -> None:
    def logs(*values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64).log()

    q, p = logs(0.9, 0.1), logs(0.01, 0.99)
    assert float(clipped(FKL, q, p, 1e9)[1][0]) == pytest.approx(-0.89)
    assert float(clipped(FKL, q, p, 0.05)[1][0]) == pytest.approx(0.001)
    assert float(clipped(FKL, q, p, 0.05)[0]) == pytest.approx(-0.18, abs=5e-3)
    q, p = logs(0.01, 0.99), logs(0.9, 0.1)  # a confident error
    assert float(clipped(RKL, q, p, 1e9)[1][0]) == pytest.approx(0.61, abs=0.01)
    assert float(clipped(RKL, q, p, 0.05)[1][0]) == pytest.approx(0.12, abs=0.01)


def test_clipped_terms_are_counted_on_the_spans() -> None:
    method = trace(clip_terms=0.05)
    at = moment(method)
    engine = Engine(method, at)
    gradient(engine)
    assert engine.metrics()["key/clipped"] > 0.5  # of the terms of a marked token
    with pytest.raises(ValueError, match="forward_kl and reverse_kl"):
        gradient(Engine(m := trace(key="jsd(0.5)", clip_terms=0.05), moment(m)))


# Spans


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator(["the sum of the numbers is 12"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


BYTES = byte_level()


@given(text=st.text(max_size=20).filter(lambda text: "<end>" not in text and "\ufffd" not in text))
def test_every_character_belongs_to_the_tokens_that_write_it(text: str) -> None:
    ids = BYTES(text)["input_ids"]
    found, offsets = readers.locate(BYTES, [*ids, BYTES.eos_token_id])
    assert found == text
    assert offsets[-1][0] == offsets[-1][1]
    assert offsets[:-1] == [tuple(pair) for pair in BYTES(text, return_offsets_mapping=True)["offset_mapping"]]


def test_spans_are_cut_at_the_cap_the_first_ones_kept() -> None:
    offsets = [(i, i + 1) for i in range(10)]
    assert readers.overlapping(offsets, [(6, 8), (0, 3), (7, 9)]) == [6, 7, 0, 1, 2, 8]
    method = trace(annotator=lambda _, response, __: {"spans": [[0, len(response)]], "label": "all"}, cap=0.25)
    rollout = Engine(method, moment(method)).draw().rollout
    share = readers.marked(rollout).sum(1) / rollout.lengths
    assert 0 < float(share.max()) <= 0.25


def asked(count: int = 3) -> list[Asked]:
    return [Asked([{"role": "user", "content": "12 + 7 - 5"}], "12+7=18;18-5=13", False) for _ in range(count)]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"spans": [[3, 99]], "label": "x"}, "15 characters"),
        ({"spans": [[-1, 2]], "label": "x"}, "not in the response"),
        ({"segments": [2], "label": "x"}, "2 segments"),
        ({"segments": [0], "label": ""}, "label"),
        ({"segments": [0], "label": "l" * 81}, "label"),
        ("nothing", "spans or segments"),
    ],
)
def test_a_wrong_annotation_is_refused(answer: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_annotation(answer, asked()[0].response)


def test_a_failure_costs_its_row_and_is_counted() -> None:
    calls: list[str] = []

    def moody(problem: str, response: str, correct: bool) -> dict[str, Any]:
        calls.append(response)
        number = len(calls) % 4
        if number == 0:
            raise RuntimeError("no")
        if number == 1:
            time.sleep(30)
        return {"spans": [[0, len(response) + (number == 2)]], "label": "x"}

    method = trace(annotator=moody, timeout=0.5, error="reverse_kl")
    engine = Engine(method, moment(method))
    began = time.monotonic()
    with pytest.warns(UserWarning, match="12 of 16 rows could not be read"):
        step = engine.draw()
    assert time.monotonic() - began < 10
    assert engine.metrics()["reader/failed"] == 12
    failed = torch.tensor(["failed" in note for note in step.rollout.notes])
    assert not readers.marked(step.rollout)[failed].any()
    assert (step["rest"][failed] == 1).all()
    assert readers.marked(step.rollout)[~failed].any()


class Chat(BaseHTTPRequestHandler):
    replies: list[Any] = []
    asked: list[Any] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body, self.headers.get("Authorization")))
        reply = self.replies.pop(0)
        self.send_response(reply if isinstance(reply, int) else 200)
        self.end_headers()
        if isinstance(reply, str):
            self.wfile.write(json.dumps({"choices": [{"message": {"content": reply}}]}).encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    http = HTTPServer(("127.0.0.1", 0), Chat)
    Chat.replies, Chat.asked = [], []
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1"
    http.shutdown()
    http.server_close()


def test_an_endpoint_is_asked_again_and_its_nonsense_is_counted(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(annotators.KEY, "key")
    who = replace(annotator(server, model="judge", timeout=5.0), pause=0.01)
    assert isinstance(who, Endpoint)
    good = 'Sure: {"segments": [0], "label": "carry"}'
    for replies, wanted in (([503, good], "carry"), (["no json"], ValueError), ([401], OSError), ([500] * 3, OSError)):
        Chat.replies = list(replies)
        (found,) = who.annotate(asked(1), None)  # type: ignore[arg-type]
        if isinstance(wanted, str):
            assert found == annotators.Annotation(((0, 7),), wanted)
        else:
            assert isinstance(found, wanted)
        assert Chat.replies == []
    path, body, key = Chat.asked[0]
    assert (path, body["model"], key) == ("/v1/chat/completions", "judge", "Bearer key")
    assert "0: 12+7=18" in body["messages"][0]["content"]


def test_the_student_annotates_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    method = trace(annotator="model")
    at = moment(method)
    found = Player(tokens=8).annotate(asked(), at)
    assert all(isinstance(one, ValueError) for one in found)  # the question is longer than this context of 128
    monkeypatch.setattr(annotators, "QUESTION", "{verdict}{what:.0}{problem}{solution:.0}")
    found = Player(tokens=8).annotate(asked(), at)
    assert all("no JSON" in str(one) for one in found)
    reply = '{"segments": [1], "label": "minus"}'
    monkeypatch.setattr(at.tokenizer, "batch_decode", lambda *args, **kwargs: [reply] * 3)
    assert Player(tokens=8).annotate(asked(), at) == [annotators.Annotation(((8, 15),), "minus")] * 3


@pytest.mark.parametrize(
    ("response", "correct", "span", "label"),
    [
        ("12+7=18;18-5=13", False, "18", "plain"),
        ("12+7=19;19-6=13", False, "19-6=13", "terms not there"),
        ("12+7=19", False, "12+7=19", "too short"),
        ("12+7=19;?;19-5=14", False, "?", "not a step"),
        ("12+7=19;19-5=14", True, "14", "plain"),
        ("7-5=2;12+2=14", True, "14", "plain"),
    ],
)
def test_the_rule(response: str, correct: bool, span: str, label: str) -> None:
    (found,) = Rule().annotate([Asked([{"role": "user", "content": "12 + 7 - 5"}], response, correct)], None)  # type: ignore[arg-type]
    assert isinstance(found, annotators.Annotation)
    ((start, end),) = found.spans
    assert (response[start:end], found.label) == (span, label)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"annotator": "rules"}, "source.annotator='rules'"),
        ({"annotator": "http://localhost/v1"}, "source.annotator_model"),
        ({"template": "{prompt}"}, "target.template"),
        ({"template": "{prompt} {hint} {spans}"}, "target.template"),
        ({"cap": 0.0}, "source.cap"),
        ({"key": None}, "use method grpo"),
        ({"key": "forward_lk"}, "forward_lk"),
        ({"samples": 1}, "source.samples"),
        ({"sync": 0}, "schedule.sync"),
        ({"timeout": 0.0}, "source.timeout"),
    ],
)
def test_wrong_fields_are_refused_at_once(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        trace(**changes)


def test_the_rule_refuses_another_task() -> None:
    method = trace(annotator="rule")
    at = moment(method)
    at.task.train = [replace(at.task.train[0], messages=[{"role": "user", "content": "Who wrote it?"}])]
    with pytest.raises(ValueError, match="embedded:arithmetic"):
        method.begin(at)
