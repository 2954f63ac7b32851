"""A small language model trained here, for measurements that depend on what trained distributions look like.

There is nothing to download: the text is the Python sources of the standard library, the tokenizer a byte-level BPE of
32,768 trained on them, the model two narrow transformer layers under a head of [32768, 1024]. One run gives two
checkpoints, the student earlier than the teacher. Ten minutes do not train a model to 1 nat on new text, so most
sequences come from a small part of the files and are seen many times: what is measured at about 1 nat is text that the
model was trained on, and text that it never saw is measured beside it.

    python -m benchmarks.trained --seconds 150      goes on from where it was; again until it says that it is done

What it makes (half a gigabyte) lies under runs/trained and is in no repository.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from kullback.run.progress import ProgressBar

FOLDER = Path("runs/trained")
EVERY_HELD_OUT = 20  # of 20 files one is never trained on


@dataclass(frozen=True)
class Size:
    vocab: int = 32768
    width: int = 1024
    heads: int = 4  # of width 64 each: the layers are narrow, the head is what is measured
    layers: int = 2
    length: int = 128  # tokens of a sequence
    batch: int = 8  # sequences of a step
    fresh: int = 2  # of them from all files, the others from the part that is seen many times
    repeated: int = 16384  # tokens of that part
    negatives: int = 4096  # tokens of the vocabulary that stand for the rest of it in the normaliser
    student: int = 360  # steps
    teacher: int = 500
    full: int = 40  # the last steps before either checkpoint normalise over the whole vocabulary
    warmup: int = 40
    rate: float = 1e-3
    files: int | None = None  # of the library; None: all
    head_rate: float = 3e-4  # one step moves a logit by width times as much


def sources() -> list[Path]:
    """Every module of the standard library but its tests, in the order of the names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    without = {"site-packages", "test", "tests", "idle_test"}
    return [path for path in sorted(root.rglob("*.py")) if not without & set(path.relative_to(root).parts)]


def tokenize(texts: list[str], vocab: int, folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer


@dataclass(frozen=True)
class Text:
    """Token ids: the part seen many times, all training files, the held-out files."""

    repeated: Tensor
    training: Tensor
    held_out: Tensor


def text(size: Size, folder: Path) -> Text:
    files = [path.read_text(encoding="utf-8", errors="replace") for path in sources()[: size.files]]
    tokenizer = tokenize(files, size.vocab, folder)
    encoded = [item.ids for item in tokenizer.encode_batch(files)]

    def joined(choose: list[list[int]]) -> Tensor:
        return torch.tensor([token for ids in choose for token in ids])

    held_out = encoded[::EVERY_HELD_OUT]
    training = joined([ids for i, ids in enumerate(encoded) if i % EVERY_HELD_OUT])
    return Text(training[: size.repeated], training, joined(held_out))


class Layer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        inner = 64 * size.heads
        self.heads = size.heads
        self.qkv = nn.Linear(size.width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, size.width, bias=False)
        self.up = nn.Linear(size.width, size.width, bias=False)
        self.down = nn.Linear(size.width, size.width, bias=False)
        for write in (self.out, self.down):
            nn.init.zeros_(write.weight)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(F.rms_norm(x, x.shape[-1:])).unflatten(-1, (3, self.heads, 64)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(F.rms_norm(x, x.shape[-1:]))))


class Model(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.head = nn.Parameter(0.02 * torch.randn(size.vocab, size.width))
        self.embedding = nn.Parameter(torch.randn(size.vocab, size.width))
        self.place = nn.Parameter(0.1 * torch.randn(size.length, size.width))
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states [sequence, token, width]: what the head multiplies."""
        x = self.embedding[ids] + self.place[: ids.shape[-1]]
        for layer in self.layers:
            x = layer(x)
        return F.rms_norm(x, x.shape[-1:])


def cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, negatives: int | None, rng: torch.Generator) -> Tensor:
    """Nats per token. With `negatives`, an unbiased normaliser: labels of the batch exactly, a sample of the rest."""
    if negatives is None:
        return F.cross_entropy((hidden @ head.t()).float(), labels)
    present, labels = labels.unique(return_inverse=True)
    absent = torch.ones(len(head), dtype=torch.bool).index_fill_(0, present, False).nonzero()[:, 0]
    chosen = absent[torch.randperm(len(absent), generator=rng)[:negatives]]
    logits = (hidden @ head[torch.cat([present, chosen])].t()).float()
    raised = torch.zeros(logits.shape[1])
    raised[len(present) :] = math.log(len(absent) / max(len(chosen), 1))
    return F.cross_entropy(logits + raised, labels)


def batch(from_text: Text, size: Size, step: int) -> Tensor:
    """[batch, length + 1] token ids, a function of the step alone."""
    rng = torch.Generator().manual_seed(step)
    often = torch.randint(len(from_text.repeated) - size.length, (size.batch - size.fresh,), generator=rng)
    fresh = torch.randint(len(from_text.training) - size.length, (size.fresh,), generator=rng)
    windows = [from_text.repeated[i : i + size.length + 1] for i in often.tolist()]
    return torch.stack(windows + [from_text.training[i : i + size.length + 1] for i in fresh.tolist()])


def train(size: Size = Size(), folder: Path = FOLDER, seconds: float = math.inf) -> bool:
    """Go on training for `seconds`, then save. Returns whether both checkpoints are there."""
    found = text(size, folder)
    torch.manual_seed(0)
    model = Model(size)
    rates = {name: size.head_rate if name == "head" else size.rate for name, _ in model.named_parameters()}
    groups = [{"params": [value], "lr": rates[name], "peak": rates[name]} for name, value in model.named_parameters()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    state = folder / "state.pt"
    done = 0
    if state.exists():
        saved = torch.load(state)
        done = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    until = time.monotonic() + seconds
    with ProgressBar(size.teacher, "train", start=done) as progress:
        while done < size.teacher and time.monotonic() < until:
            rows = batch(found, size, done)
            left = min(stop - done for stop in (size.student, size.teacher) if stop > done)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min(1.0, (done + 1) / size.warmup, max(0.1, left / size.student))
            with torch.autocast("cpu", torch.bfloat16):
                hidden = model(rows[:, :-1])
                loss = cross_entropy(
                    hidden.flatten(0, 1),
                    model.head,
                    rows[:, 1:].flatten(),
                    None if left <= size.full else size.negatives,
                    torch.Generator().manual_seed(done),
                )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
            progress.advance(loss=round(loss.item(), 3))
            for name, stop in (("student", size.student), ("teacher", size.teacher)):
                if done == stop:
                    torch.save(model.state_dict(), folder / f"{name}.pt")
    torch.save({"step": done, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, state)
    return done >= size.teacher


@torch.no_grad()
def problem(tokens: int, *, held_out: bool = False, size: Size = Size(), folder: Path = FOLDER) -> dict[str, Tensor]:
    """Hidden states of both checkpoints on consecutive text, and their heads, in float32.

    Raises:
        FileNotFoundError: not trained yet.
    """
    found = text(size, folder)
    ids = (found.held_out if held_out else found.repeated)[: tokens // size.length * size.length]
    out: dict[str, Tensor] = {}
    for side, name in (("target", "teacher"), ("model", "student")):
        path = folder / f"{name}.pt"
        if not path.exists():
            raise FileNotFoundError(f"{path}: train it first, python -m benchmarks.trained")
        model = Model(size)
        model.load_state_dict(torch.load(path))
        out[f"{side}_hidden"] = model(ids.view(-1, size.length)).flatten(0, 1)
        out[f"{side}_head"] = model.head.detach()
    for name in ("model_hidden", "model_head"):
        out[name].requires_grad_()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trained", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after this time; run again to go on")
    finished = train(seconds=parser.parse_args().seconds)
    print("done" if finished else "not done: run again to go on")


if __name__ == "__main__":
    main()
