"""The embedded models: a tokenizer that loses nothing, and a teacher and a student that are what the README says."""

import string
from importlib.resources import files

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from kullback.lm import tiny, worked
from kullback.lm.tasks import load_task

ASSETS = files("kullback") / "assets"
NAMES = ("teacher", "student")
TURNS = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "1 + 2"},
    {"role": "assistant", "content": "1+2=3"},
]
TOKENIZER = tiny.build_tokenizer()
PRINTABLE = string.digits + string.ascii_letters + string.punctuation + " \t\n"


@given(st.text(alphabet=PRINTABLE))
def test_any_printable_text_comes_back(text):
    ids = TOKENIZER(text)["input_ids"]
    assert len(ids) == len(text) or "<|" in text
    assert TOKENIZER.decode(ids) == text


def test_other_characters_are_unknown_and_special_tokens_are_single():
    assert TOKENIZER("é€")["input_ids"] == [TOKENIZER.unk_token_id] * 2
    for token in tiny.SPECIAL:
        assert len(TOKENIZER(token)["input_ids"]) == 1
    assert len({TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id}) == 3


def test_chat_template_marks_what_the_assistant_wrote():
    whole = TOKENIZER.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    prompt = TOKENIZER.apply_chat_template(TURNS[:2], return_dict=True, add_generation_prompt=True)["input_ids"]
    ids, mask = whole["input_ids"], whole["assistant_masks"]
    assert TOKENIZER.decode(ids) == "<|system|>Add.<|end|><|user|>1 + 2<|end|><|assistant|>1+2=3<|end|>"
    assert ids[: len(prompt)] == prompt
    assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    assert ids[-1] == TOKENIZER.eos_token_id
    with pytest.raises(Exception, match="roles system, user and assistant"):
        TOKENIZER.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_building_is_seeded_and_leaves_the_callers_random_state_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    spec = {"architecture": "qwen3", "hidden_size": 32, "layers": 1, "heads": 2, "seed": 5}
    (one, tokenizer), (other, _) = tiny.build(spec), tiny.build(spec)
    assert torch.equal(torch.rand(3), expected)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert one.config.vocab_size == len(tokenizer)
    assert one.config.pad_token_id == tokenizer.pad_token_id
    assert one.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"architecture": "llama"}, "student.architecture='llama'"),
        ({"hiden_size": 3}, "student.hiden_size=3: .*did you mean hidden_size"),
        ({"hidden_size": 33}, "student.hidden_size=33: choose a multiple of 8"),
        ({"layers": "2"}, "student.layers='2': choose a whole number"),
    ],
)
def test_wrong_sizes_are_named(spec, says):
    with pytest.raises(ValueError, match=says):
        tiny.build(spec)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_saving_and_loading(tmp_path, dtype):
    model, tokenizer = tiny.build({"hidden_size": 32, "layers": 1, "heads": 2})
    tiny.save(model, tokenizer, tmp_path, dtype)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.float32
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0 if dtype == "float32" else 1e-3, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_shipped_files_are_small_and_safe():
    shipped = [file for name in NAMES for file in (ASSETS / name).iterdir()]
    assert sum(file.stat().st_size for file in shipped) <= 4 * 2**20
    assert {file.suffix for file in shipped} <= {".json", ".jinja", ".safetensors"}
    assert all(file.stat().st_mode & 0o044 for file in shipped)  # readable by others, after installing as root too


@pytest.fixture(scope="module")
def shipped():
    return {name: AutoModelForCausalLM.from_pretrained(ASSETS / name).eval() for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_shipped_models_are_ordinary_and_share_their_tokenizer(shipped, name):
    model, tokenizer = shipped[name], AutoTokenizer.from_pretrained(ASSETS / name)
    assert model.config.model_type == "qwen3"
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert tokenizer.chat_template == TOKENIZER.chat_template
    assert tokenizer.decode(tokenizer("a  b .")["input_ids"]) == "a  b ."


def sample(model, problems, **options):
    """One completion of each problem, by transformers' own `generate`: what any user of the models would call."""
    texts = [TOKENIZER.apply_chat_template(p.messages, tokenize=False, add_generation_prompt=True) for p in problems]
    inputs = TOKENIZER(texts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = model.generate(**inputs, max_new_tokens=48, **options)
    return TOKENIZER.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("name", "options", "low", "high"),
    [
        ("teacher", {"do_sample": True, "temperature": 1.0}, 0.87, 1.0),  # 0.92 on 500: see the recipe
        ("teacher", {"do_sample": False}, 0.95, 1.0),
        ("student", {"do_sample": True, "temperature": 1.0}, 0.1, 0.5),
    ],
)
def test_accuracy_on_held_out_problems(shipped, name, options, low, high):
    task = load_task("embedded:arithmetic", seed=0)
    problems = task.held_out[:200]
    texts = sample(shipped[name], problems, **options)
    accuracy = sum(task.verify(p, text)["accuracy"] for p, text in zip(problems, texts, strict=True)) / len(problems)
    assert low <= accuracy <= high


def test_the_teacher_keeps_every_way_of_solving(shipped):
    """A teacher with one mode would make all divergences agree."""
    problems = load_task("embedded:arithmetic", seed=0).held_out[:300]
    texts = sample(shipped["teacher"], problems, do_sample=True, temperature=1.0)
    for style, frequency in worked.STYLES.items():
        written = [worked.write_steps(p.metadata["expression"], style) for p in problems]
        share = sum(a == b for a, b in zip(texts, written, strict=True)) / len(problems)
        assert share >= frequency / 2
