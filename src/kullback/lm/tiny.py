"""The embedded default: a tiny Qwen3 teacher and student with a character tokenizer, shipped inside the package.

Recipes name them "embedded:teacher" and "embedded:student" (`models.locate`). They are ordinary Hugging Face models in
a directory, so everything that runs on them runs on two hub names too. `recipes/embedded_teacher.yaml` and
`recipes/embedded_student.yaml` say how they were trained.
"""

import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

PAD, END, UNKNOWN = "<|pad|>", "<|end|>", "<|unknown|>"
SPECIAL = [PAD, END, UNKNOWN, "<|system|>", "<|user|>", "<|assistant|>"]
CHARACTERS = ["\n", "\t", *map(chr, range(32, 127))]
OPTIONAL = ("kv_heads", "intermediate_size")  # None derives them from the other sizes
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% elif message['role'] in ['system', 'user'] %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% else %}{{ raise_exception('this chat template knows the roles system, user and assistant') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(max_length: int = 128) -> "PreTrainedTokenizerFast":
    """One token for every printable ASCII character, newline and tab; decoding gives the text back exactly."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(SPECIAL + CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # without it, decoding would join the tokens with spaces
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=SPECIAL[3:],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(
    *,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int | None = None,
    intermediate_size: int | None = None,
    max_length: int = 128,
    seed: int = 0,
) -> "Qwen3ForCausalLM":
    """An untrained Qwen3 for `build_tokenizer`, in float32; the same seed gives the same weights.

    Args:
        kv_heads: fewer than `heads` shares keys and values between query heads; default half of them.
        intermediate_size: width of the gated feed-forward layer; default twice `hidden_size`.
        max_length: the context, in tokens.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if hidden_size % (2 * heads):
        raise ValueError(f"student.hidden_size={hidden_size}: choose a multiple of {2 * heads}, twice the heads")
    vocabulary = SPECIAL + CHARACTERS
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or max(1, heads // 2),
        head_dim=hidden_size // heads,
        intermediate_size=intermediate_size or 2 * hidden_size,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        pad_token_id=vocabulary.index(PAD),
        eos_token_id=vocabulary.index(END),
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).float()


def build(spec: Mapping[str, Any]) -> "tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]":
    """An untrained model and its tokenizer.

    Args:
        spec: {"architecture": "qwen3", ...} with the arguments of `build_model`, as a recipe's `student` may be.
    """
    sizes = dict(spec)
    architecture = sizes.pop("architecture", "qwen3")
    if architecture != "qwen3":
        raise ValueError(f"student.architecture={architecture!r}: the only one that is built from sizes is qwen3")
    known = list(inspect.signature(build_model).parameters)
    for key, value in sizes.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; choose from {', '.join(known)}"
            raise ValueError(f"student.{key}={value!r}: there is no such size{hint}")
        if isinstance(value, bool) or not (isinstance(value, int) or (value is None and key in OPTIONAL)):
            raise ValueError(f"student.{key}={value!r}: choose a whole number")
    model = build_model(**sizes)
    return model, build_tokenizer(model.config.max_position_embeddings)


def save(model: Any, tokenizer: Any, directory: str | Path, dtype: str = "float32") -> None:
    """Write model and tokenizer as safetensors; the config says float32 either way, so that is what they load as."""
    import torch

    stored = {"float32": torch.float32, "float16": torch.float16}[dtype]
    model.config.dtype = torch.float32
    tied = "lm_head.weight" if model.config.tie_word_embeddings else None
    state = {name: tensor.to(stored) for name, tensor in model.state_dict().items() if name != tied}
    model.save_pretrained(directory, state_dict=state)
    tokenizer.save_pretrained(directory)
    for file in Path(directory).iterdir():
        file.chmod(0o644)  # safetensors are written for their owner only, and these are shipped
