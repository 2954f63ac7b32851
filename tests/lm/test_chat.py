"""Chat turns to tokens: only what the assistant wrote is trained, and training text is what generation would read."""

import pytest

from kullback.lm.chat import end_ids, prompt_ids, reply_ids
from kullback.lm.rollout import Origin
from kullback.lm.tiny import build_tokenizer
from tests.lm.small import random_model

TOKENIZER = build_tokenizer()
QUESTION = [{"role": "user", "content": "2+2?"}]


def text(ids: list[int]) -> str:
    return str(TOKENIZER.decode(ids))


def test_a_prompt_ends_where_the_assistant_starts() -> None:
    assert text(prompt_ids(TOKENIZER, QUESTION)) == "<|user|>2+2?<|end|><|assistant|>"


def test_a_system_prompt_is_added_or_replaced() -> None:
    expected = "<|system|>Be brief.<|end|><|user|>2+2?<|end|><|assistant|>"
    assert text(prompt_ids(TOKENIZER, QUESTION, system="Be brief.")) == expected
    turns = [{"role": "system", "content": "Be long."}, *QUESTION]
    assert text(prompt_ids(TOKENIZER, turns, system="Be brief.")) == expected


def test_ids_that_are_kept_follow_the_template_and_belong_to_nobody() -> None:
    tokenizer = build_tokenizer()
    reply = [{"role": "assistant", "content": "4"}]
    first, (ids, origins) = prompt_ids(tokenizer, QUESTION), reply_ids(tokenizer, QUESTION, reply)
    expected = list(first), (list(ids), list(origins))
    for given in (first, ids, origins):
        given.append(0)
    assert (prompt_ids(tokenizer, QUESTION), reply_ids(tokenizer, QUESTION, reply)) == expected
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|assistant|>'", "'<|system|>'")
    assert str(tokenizer.decode(prompt_ids(tokenizer, QUESTION))) == "<|user|>2+2?<|end|><|system|>"
    tokenizer.eos_token = "<|user|>"
    assert reply_ids(tokenizer, QUESTION, reply)[0][-1] == tokenizer.convert_tokens_to_ids("<|user|>")


def test_prompt_and_reply_are_the_whole_conversation() -> None:
    reply = [
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ]
    ids, origins = reply_ids(TOKENIZER, QUESTION, reply)
    whole = TOKENIZER.apply_chat_template([*QUESTION, *reply], tokenize=False)
    assert text(prompt_ids(TOKENIZER, QUESTION) + ids) == whole
    trained = "".join(text([token]) for token, origin in zip(ids, origins, strict=True) if origin == Origin.DATASET)
    assert trained == "4<|end|>yes<|end|>"
    assert set(origins) == {Origin.DATASET, Origin.TOOL}


def test_a_reply_ends_with_the_end_token_exactly_once() -> None:
    ids, origins = reply_ids(TOKENIZER, QUESTION, [{"role": "assistant", "content": "4"}])
    assert ids.count(TOKENIZER.eos_token_id) == 1
    assert ids[-1] == TOKENIZER.eos_token_id
    assert origins == [Origin.DATASET] * 2


def test_without_a_template_contents_stand_as_they_are() -> None:
    plain = build_tokenizer()
    plain.chat_template = None
    ids, origins = reply_ids(plain, QUESTION, [{"role": "assistant", "content": " 4"}])
    assert plain.decode(prompt_ids(plain, QUESTION) + ids) == "2+2? 4<|end|>"
    assert set(origins) == {Origin.DATASET}


def test_a_template_that_rewrites_history_is_refused() -> None:
    changing = build_tokenizer()
    changing.chat_template = (
        "{% for m in messages %}"
        "<|{{ m['role'] }}|>{{ m['content'] if loop.last else m['content'][:1] }}<|end|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    turns = [{"role": "assistant", "content": "long answer"}, {"role": "user", "content": "and"}]
    with pytest.raises(ValueError, match="the chat template rewrites turn"):
        reply_ids(changing, QUESTION, turns)


def test_every_end_token_of_a_model_ends() -> None:
    model = random_model(0)
    model.generation_config.eos_token_id = [7, 9]
    assert end_ids(TOKENIZER, model) == sorted({7, 9, TOKENIZER.eos_token_id})
