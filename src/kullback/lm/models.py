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
    if _is_linear(module):
        return Head(_whole(module, "weight"), _whole(module, "bias"), scale, softcap)
    return Head(None, None, scale, softcap, module)


def _is_linear(module: nn.Module) -> bool:
    """A linear layer and nothing on top of it. FSDP2 gives a module that it shards a class of its own."""
    kind = type(module)
    if kind is nn.Linear or nn.Linear not in kind.__bases__:
        return kind is nn.Linear
    from torch.distributed.fsdp import FSDPModule

    return set(kind.__bases__) == {FSDPModule, nn.Linear}


def _whole(head: nn.Module, name: str) -> Tensor | None:
    """A parameter with all its rows: where FSDP2 keeps it in shards it is gathered here, once for all that use it.

    Its gradient is scattered back as a mean over processes, which is what FSDP makes of every other gradient.

    Raises:
        ValueError: it is sharded in a way that it cannot be gathered with its gradient.
    """
    parameter = getattr(head, name)
    if parameter is None:
        return None
    if hasattr(parameter, "ds_id"):
        raise ValueError(
            "DeepSpeed ZeRO-3 (zero_optimization.stage=3) shards the head, which the loss needs whole: use "
            "zero_optimization.stage=2, or FSDP with fsdp_version=2"
        )
    if name not in head._parameters or parameter.dim() != (2 if name == "weight" else 1):
        raise ValueError(
            "fsdp_version=1 keeps the head in a flat buffer, from which the loss cannot take it with its gradient: set "
            "fsdp_version=2"
        )
    if type(parameter) in (nn.Parameter, Tensor):
        return parameter
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    if "tp" in (mesh.mesh_dim_names or ()):
        raise ValueError("tensor parallelism splits the head, which the loss needs whole: use tp_size=1, and FSDP")
    full: Tensor = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda gradient: gradient / mesh.size())
    return full


@contextmanager
def _captured(module: nn.Module) -> Iterator[list[Tensor]]:
    """While inside, the head keeps what it is given and computes nothing.

    The model is still called as a whole, so DDP, FSDP and adapters see an ordinary forward pass.
    """
    kept: list[Tensor] = []

    def keep(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kept.append(hidden)
        return hidden[..., :0].clone()  # not a view: FSDP warns of those

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
        out = (wrapped if wrapped is not None else model)(**layout.inputs, use_cache=False)
    if len(kept) != 1:
        raise ValueError(
            f"{type(model).__name__} calls its output layer {len(kept)} times in a forward pass; once is supported"
        )
    # plus an empty sum: the gradient then passes the model's output, where FSDP hears that the backward pass begins
    return kept[0][layout.at] + out.logits.sum().to(kept[0].dtype)


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
