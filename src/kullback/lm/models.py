"""Hugging Face causal language models: loading, tokenizers that must agree, and hidden states with their head."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from kullback.lm.layout import Layout

SHIPPED = ("teacher", "student")


def locate(name: str) -> str:
    """A path or hub name; "embedded:teacher" and "embedded:student" are the models that kullback ships."""
    if not name.startswith("embedded:"):
        return name
    which = name.removeprefix("embedded:")
    if which not in SHIPPED:
        near = get_close_matches(which, SHIPPED, n=1, cutoff=0.0)[0]
        raise ValueError(f"model={name!r}: kullback ships {' and '.join(SHIPPED)}; did you mean embedded:{near}?")
    return str(files("kullback") / "assets" / which)


def load_model(name: str, *, role: str, dtype: str | torch.dtype = "float32", device: str | None = None) -> Any:
    """A causal language model by path, hub name or "embedded:...".

    Raises:
        ValueError: nothing is there, or it is no causal language model: one sentence that names the role.
    """
    path = locate(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_cannot_load(name, role, error)) from error
    loaded: Any = model
    return loaded.to(device) if device else loaded


def load_tokenizer(name: str, *, role: str) -> PreTrainedTokenizerBase:
    """The tokenizer that stands beside a model."""
    try:
        return AutoTokenizer.from_pretrained(locate(name), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_cannot_load(name, role, error)) from error


def check_loadable(name: str, *, role: str) -> None:
    """Read only the configuration, so that a wrong name fails before anything slow starts."""
    try:
        AutoConfig.from_pretrained(locate(name), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_cannot_load(name, role, error)) from error


def _cannot_load(name: str, role: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        reason = "the directory has no config.json"
    elif ("/" in name or "." in name) and not path.exists() and name.count("/") != 1:
        reason = "there is no such directory"
    return f"{role}={name!r} cannot be loaded ({reason}); give a directory saved with save_pretrained, or a hub name"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers that give any text the same ids: the vocabulary and what the fast tokenizer does with it."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {}
    if backend is not None:
        described = json.loads(backend.to_str())
        rules = {part: described.get(part) for part in ("normalizer", "pre_tokenizer")}
        rules["merges"] = (described.get("model") or {}).get("merges")
    return hashlib.sha256(json.dumps([vocabulary, rules], sort_keys=True).encode()).hexdigest()[:16]


def check_same_tokenizer(student: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, *, role: str) -> None:
    """Token-level divergences compare ids, so they must mean the same.

    Raises:
        ValueError: some id means another token on the other side, naming the first.
    """
    if tokenizer_fingerprint(student) == tokenizer_fingerprint(other):
        return
    ours, theirs = student.get_vocab(), other.get_vocab()
    differing = sorted(set(ours.items()) ^ set(theirs.items()), key=lambda item: item[1])
    detail = f"token {differing[0][0]!r} differs (id {differing[0][1]})" if differing else "they split text differently"
    raise ValueError(
        f"target.{role}: its tokenizer is not the student's: {detail}, {len(ours)} against {len(theirs)} tokens; "
        "choose two models of one family"
    )


def context_length(model: Any) -> int | None:
    """Positions the model was made for, in tokens; None if it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision widened; float32 and float64 as they are."""
    return values.to(torch.promote_types(torch.float32, values.dtype))


@dataclass(frozen=True)
class Head:
    """The last step of a language model: logits = softcap(scale * (hidden weight^T + bias)).

    `module` stands in for weight and bias where the head is no plain linear layer (an adapter on it, say).
    """

    weight: Float[Tensor, "vocab width"] | None
    bias: Float[Tensor, "vocab"] | None
    scale: float = 1.0
    softcap: float | None = None
    module: nn.Module | None = None

    @property
    def matrix(self) -> Float[Tensor, "vocab width"]:
        """The weight of a plain head."""
        assert self.weight is not None, "this head is a module"
        return self.weight

    def logits(self, hidden: Float[Tensor, "n width"]) -> Float[Tensor, "n vocab"]:
        """In float32 or wider whatever the dtype: a divergence is made of small differences of log-probabilities."""
        if self.module is not None:
            logits = at_least_float32(self.module(hidden))
        else:
            logits = at_least_float32(nn.functional.linear(hidden, self.matrix.to(hidden.dtype), self.bias))
        logits = logits * self.scale
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


def head_of(model: Any) -> Head:
    """The head of a causal language model, with the scale and soft-cap its configuration names."""
    module = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    if type(module) is nn.Linear:
        return Head(module.weight, module.bias, scale, softcap)
    return Head(None, None, scale, softcap, module)


@contextmanager
def _captured(module: nn.Module) -> Iterator[list[Tensor]]:
    """While inside, the head keeps what it is given and computes nothing.

    The model is still called as a whole, so DDP, FSDP and adapters see an ordinary forward pass.
    """
    kept: list[Tensor] = []

    def keep(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kept.append(hidden)
        return hidden[..., :0]

    before = module.__dict__.get("forward")  # accelerate and compilers may have put one on the instance
    module.forward = keep
    try:
        yield kept
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def hidden_states(model: Any, layout: Layout, *, wrapped: Any = None) -> Float[Tensor, "scored width"]:
    """The last hidden states that predict the scored tokens.

    Args:
        wrapped: the same model inside DDP or FSDP, which is then the one that is called.
    """
    with _captured(model.get_output_embeddings()) as kept:
        (wrapped if wrapped is not None else model)(**layout.inputs, use_cache=False)
    if len(kept) != 1:
        raise ValueError(
            f"{type(model).__name__} calls its output layer {len(kept)} times in a forward pass; once is supported"
        )
    return kept[0][layout.at]


@torch.no_grad()
def check_head(model: Any, *, role: str) -> None:
    """Compare hidden states + head with the model's own logits on a few tokens.

    Raises:
        ValueError: they differ, so the head does something this library does not know; or the logits are not finite.
    """
    device = next(model.parameters()).device
    ids = torch.arange(4, device=device)[None] % model.config.get_text_config().vocab_size
    was_training = model.training
    model.eval()
    expected = model(input_ids=ids, use_cache=False).logits.float()
    with _captured(model.get_output_embeddings()) as kept:
        model(input_ids=ids, use_cache=False)
    model.train(was_training)
    if not expected.isfinite().all():
        raise ValueError(
            f"{role}: its logits are not finite on a four-token text; the weights are damaged or overflow {model.dtype}"
        )
    got = head_of(model).logits(kept[0][0])
    if not torch.allclose(got, expected[0], atol=1e-2 * float(expected.abs().max()) + 1e-4):
        raise ValueError(
            f"{role}: {type(model).__name__} changes its logits after the output layer in a way kullback does not know "
            "(scale and soft-cap are); please report the architecture"
        )
