"""Hidden states and heads of several architectures; tokenizers that must agree; adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from kullback.lm.models import (
    check_head,
    check_loadable,
    check_same_tokenizer,
    context_length,
    head_of,
    load_model,
    locate,
)
from kullback.lm.targets import read
from kullback.lm.tiny import build_tokenizer
from tests.lm.small import make, make_moment, random_model

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def architectures() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "qwen3": random_model(0),
        "gemma2 (soft-cap)": Gemma2ForCausalLM(
            Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0, initializer_range=0.5)
        ),
        "cohere (scale)": CohereForCausalLM(
            CohereConfig(
                **SIZES,
                num_key_value_heads=1,
                logit_scale=0.25,
                initializer_range=0.5,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64)),
    }


@pytest.mark.parametrize("name", ["qwen3", "gemma2 (soft-cap)", "cohere (scale)", "gpt2"])
def test_hidden_states_and_head_give_the_model_s_own_logits(name: str) -> None:
    model = architectures()[name].eval()
    check_head(model, role="student")
    rollout = make_moment_rollout(vocab=50)
    seen = read(model, rollout)
    logits = seen.logits_of(slice(None))
    row, column = (int(x[0]) for x in seen.scored.nonzero(as_tuple=True))
    ids = torch.tensor([rollout.prompts[row] + rollout.completions[row, :column].tolist()])
    torch.testing.assert_close(logits[0], model(input_ids=ids).logits[0, -1].float(), rtol=1e-4, atol=1e-5)
    assert "forward" not in model.get_output_embeddings().__dict__  # the head is itself again


def make_moment_rollout(vocab: int) -> Any:
    from kullback.lm.rollout import Origin, build_rollout

    draw = torch.Generator().manual_seed(0)
    completions = [torch.randint(3, vocab, (n,), generator=draw).tolist() for n in (4, 2)]
    return build_rollout([[5, 6], [7]], completions, [[int(Origin.DATASET)] * len(c) for c in completions])


def test_a_head_that_does_something_unknown_is_found() -> None:
    model = random_model(0)
    forward = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits * 3
        return out

    model.forward = scaled
    with pytest.raises(ValueError, match="changes its logits after the output layer"):
        check_head(model, role="student")


def test_damaged_weights_are_found() -> None:
    model = random_model(0)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="student: its logits are not finite"):
        check_head(model, role="student")


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "lm_head"]])
def test_adapters_read_as_the_model_itself(modules: Any) -> None:
    """A plain head stays fused, an adapted one is called as a module; both give the adapted numbers and gradients."""
    torch.manual_seed(1)
    model = get_peft_model(
        random_model(0), LoraConfig(r=2, target_modules=modules, task_type="CAUSAL_LM", init_lora_weights=False)
    ).eval()
    check_head(model, role="student")
    rollout = make_moment_rollout(vocab=50)
    seen = read(model, rollout)
    assert (head_of(model).weight is None) == (modules != "all-linear")
    log_probs = seen.log_probs()
    row = torch.tensor([rollout.prompts[0] + rollout.completions[0].tolist()])
    expected = model(input_ids=row).logits.log_softmax(-1)[0, 1:-1].gather(-1, rollout.completions[0][:, None])[:, 0]
    torch.testing.assert_close(log_probs[0], expected, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad(log_probs[0].sum(), [p for p in model.parameters() if p.requires_grad])
    theirs = torch.autograd.grad(expected.sum(), [p for p in model.parameters() if p.requires_grad])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_other_tokenizers_are_refused_by_name() -> None:
    other = build_tokenizer()
    other.add_tokens(["new"])
    check_same_tokenizer(build_tokenizer(), build_tokenizer(), role="teacher")
    with pytest.raises(ValueError, match=r"target\.teacher: its tokenizer is not the student's: token 'new' differs"):
        check_same_tokenizer(build_tokenizer(), other, role="teacher")


def test_padded_heads_of_one_tokenizer_are_matched() -> None:
    """The teacher's head has 8 rows more than the student's; an identical student still scores 0."""
    method = make("on_policy_distillation", student_fraction=1.0)
    from kullback.lm.engine import Engine

    at = make_moment(method)
    teacher = random_model(1)
    teacher.resize_token_embeddings(len(at.tokenizer) + 8)
    with torch.no_grad():
        teacher.get_output_embeddings().weight[len(at.tokenizer) :] = 1.0  # what a peer would count as probability
    at.players["teacher"] = teacher.requires_grad_(False).eval()
    engine = Engine(method, at)
    (micro,) = engine.prepare(0)
    assert abs(float(engine.loss(micro).detach())) < 1e-6


def test_wrong_paths_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"student='/no/such/dir' cannot be loaded \(there is no such directory\)"):
        check_loadable("/no/such/dir", role="student")
    with pytest.raises(ValueError, match=r"the directory has no config\.json"):
        load_model(str(tmp_path), role="target.teacher")
    with pytest.raises(ValueError, match="did you mean embedded:teacher"):
        locate("embedded:taecher")


def test_context_length_is_the_model_s() -> None:
    assert context_length(random_model(0)) == 128
