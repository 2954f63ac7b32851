"""What cards 01 and 39 say of scores, optima and clips, against other formulas; and pairs in the ecosystem's shapes."""

import math
from typing import Any

import pytest
import scipy.optimize
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kullback.divergence import divergence
from kullback.lm import find_method
from kullback.lm.methods.chi_po import mixed_chi2
from kullback.lm.preferences import preference, score
from kullback.lm.tasks import load_task
from kullback.theory import tabular
from tests.lm.test_preferences import ROWS, TABLE, pairs_of, per_pair

SPREAD = torch.linspace(-12, 12, 49, dtype=torch.float64)

# Card 01


@settings(max_examples=60, deadline=None)
@given(b=st.floats(0.001, 0.999), a=st.floats(0, 1), negative=st.floats(-3, -0.01), skew=st.floats(0.01, 0.99))
def test_the_limit_of_the_link_decides_for_any_parameter(b: float, a: float, negative: float, skew: float) -> None:
    """Check 8: every jsd(b) and alpha(a) with 0 <= a <= 1 is accepted, no a < 0 and no forward skew."""
    for name in (f"jsd({b!r})", f"alpha({a!r})", f"skew_reverse_kl({skew!r})"):
        find_method("dpo")(divergence=name)
    for name in (f"alpha({negative!r})", f"skew_kl({skew!r})"):
        with pytest.raises(ValueError, match="has no closed form for pairs: its link stops at"):
            find_method("dpo")(divergence=name)


@pytest.mark.parametrize(
    ("name", "highest"),
    [("forward_kl", 1.0), ("2*jsd(0.5)", math.log(2)), ("alpha(0.3)", 1 / 0.3), ("alpha(0.7)", 1 / 0.7)],
)
def test_implicit_rewards_have_a_ceiling(name: str, highest: float) -> None:
    """Pitfall d, on curves that are 0 at the reference: score / coefficient stays below 1, log 2 and 1 / alpha."""
    D = divergence(name)
    assert D.link_at_zero == pytest.approx(highest)
    values = score(D, torch.tensor([5.0, 10.0, 19.0], dtype=torch.float64), limit=300.0)
    assert (values < highest).all()
    assert float(score(D, torch.tensor(290.0, dtype=torch.float64), limit=300.0)) == pytest.approx(highest)


def test_at_one_reward_reverse_kl_has_the_highest_entropy_from_a_uniform_reference() -> None:
    """Pitfall f: by definition, since entropy is log K - KL there; an order of trained models it is not."""
    uniform = torch.full((9,), -math.log(9), dtype=torch.float64)
    for seed in range(2):
        reward = torch.randn(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        goal = 0.6 * reward.max() + 0.4 * reward.mean()
        entropies = {
            name: float(tabular.entropy(tabular.optimum(uniform, reward, name, expected_reward=goal).log_probs))
            for name in ("reverse_kl", "forward_kl", "2*jsd(0.5)", "alpha(0.5)", "chi2_kl")
        }
        assert max(entropies, key=lambda name: entropies[name]) == "reverse_kl"


@pytest.mark.parametrize("name", TABLE)
def test_the_gradient_of_the_card_and_none_into_the_reference(name: str) -> None:
    """-coefficient sigma(-Delta) [ s'(g_w) grad log model(y_w) - s'(g_l) grad log model(y_l) ], s the card's."""
    draw = torch.Generator().manual_seed(0)
    theirs, ours = torch.randn(2, 7, 2, generator=draw, dtype=torch.float64)
    ours.requires_grad_()
    batch = pairs_of(ours, theirs)
    batch["log_prob:reference"].requires_grad_()
    found = torch.autograd.grad(
        per_pair(preference(batch, name, 0.4)).sum(), (ours, batch["log_prob:reference"]), allow_unused=True
    )
    s, slope = TABLE[name]
    g = (ours - theirs).detach()
    delta = 0.4 * (s(g)[:, 0] - s(g)[:, 1])
    pull = -0.4 * torch.sigmoid(-delta)[:, None] * slope(g) * torch.tensor([1.0, -1.0])
    torch.testing.assert_close(found[0], pull)
    assert found[1] is None


# Card 39


def test_chi_po_is_f_dpo_of_its_divergence_and_sums_over_tokens() -> None:
    """Checks 1 and 2: the same unclipped loss, bit for bit; without the power it is dpo; lengths do not count."""
    draw = torch.Generator().manual_seed(1)
    theirs, ours = torch.randn(2, 5, 2, generator=draw, dtype=torch.float64)
    batch = pairs_of(ours, theirs)
    (chi,) = find_method("chi_po")(max_reward=None, coefficient=0.3).signal(batch)  # type: ignore[call-arg]
    (dpo,) = find_method("dpo")(divergence="chi2_kl", coefficient=0.3).signal(batch)  # type: ignore[call-arg]
    assert torch.equal(chi.value, dpo.value)
    long = pairs_of(ours, theirs, lengths=(1, 5, 2, 3, 9, 1, 1, 4, 6, 2))
    assert torch.equal(find_method("chi_po")(max_reward=None, coefficient=0.3).signal(long)[0].value, chi.value)  # type: ignore[call-arg]
    g = SPREAD
    without_power = score(mixed_chi2(), g) - torch.exp(g)
    torch.testing.assert_close(without_power - without_power[24], g, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"signal\.alpha=0 must be positive; without the power it is method: dpo"):
        find_method("chi_po")(alpha=0.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("coefficient", [0.01, 0.1, 1.0])
def test_the_optimum_is_lambert_s(coefficient: float) -> None:
    """Check 3: reference * W0(exp((r - lambda) / coefficient)), lambda by scipy's root finder, W0 by Newton."""
    reference = tabular.random_policy(12, seed=4)
    r = torch.rand(12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def w0(log_x: torch.Tensor) -> torch.Tensor:
        """w + log w = log_x, by Newton in log w: log_x may be 100."""
        log_w = torch.where(log_x > 1, log_x.clamp(min=1).log(), log_x)
        for _ in range(60):
            log_w = log_w - (log_w.exp() + log_w - log_x) / (log_w.exp() + 1)
        return log_w.exp()

    torch.testing.assert_close(w0(SPREAD), torch.from_numpy(scipy.special.lambertw(SPREAD.exp().numpy()).real))

    def excess(level: float) -> float:
        return float((reference.exp() * w0((r - level) / coefficient)).sum()) - 1

    level = scipy.optimize.brentq(excess, -50, 2, xtol=1e-15)
    ratio = w0((r - level) / coefficient)
    best = tabular.optimum(reference, r, "chi2_kl", coefficient=coefficient).log_probs
    torch.testing.assert_close(best.exp(), reference.exp() * ratio, rtol=1e-9, atol=1e-14)
    assert float((r - coefficient * (ratio + ratio.log())).std()) < 1e-9
    index = torch.tensor([(i, j) for i in range(12) for j in range(12) if i != j])
    batch = pairs_of(best[index], reference[index])
    margin = preference(batch, "chi2_kl", coefficient, clip=1.0).seen["margin"][::2]
    torch.testing.assert_close(margin, r[index[:, 0]] - r[index[:, 1]], rtol=1e-6, atol=1e-8)
    assert float(margin.abs().max()) < 2  # the clip never binds there


def test_a_small_coefficient_concentrates_without_an_exponential_ratio() -> None:
    """Check 4: nearly all on the best, at a ratio of at most 1 + R / coefficient, where KL allows its exponential."""
    reference = tabular.random_policy(10, seed=6)
    r = torch.linspace(0, 1, 10, dtype=torch.float64)
    shares = []
    for coefficient in (1.0, 0.1, 0.01, 1e-3, 1e-4):
        best = tabular.optimum(reference, r, "chi2_kl", coefficient=coefficient).log_probs
        assert float((best - reference).max().exp()) <= 1 + 1 / coefficient + 1e-9
        shares.append(float(best[-1].exp()))
    assert shares == sorted(shares)
    assert shares[-1] > 0.99


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9))
def test_kl_is_below_both_of_its_chi_squared_bounds(seed: int, size: int) -> None:
    """D_KL <= log(1 + 2 D_chi2) <= 2 D_chi2, D_chi2 with its half."""
    reference, policy = tabular.random_policy(size, 2, seed=seed)
    kl = float(divergence("reverse_kl").from_log_probs(reference, policy))
    chi2 = float(divergence("alpha(-1)").from_log_probs(reference, policy))
    assert kl <= math.log1p(2 * chi2) + 1e-12
    assert math.log1p(2 * chi2) <= 2 * chi2


def test_two_large_scores_whose_difference_is_small_still_pull() -> None:
    """Pitfall a: a clip of each side would leave this pair without gradient."""
    ours = torch.tensor([[3.0, 2.95]], dtype=torch.float64, requires_grad=True)  # phi = 23.1 and 22.1, R = 1
    pull = []
    for clip in (1.0, None):
        value = preference(pairs_of(ours, torch.zeros(1, 2)), "chi2_kl", 1.0, clip=clip).value
        pull.append(torch.autograd.grad(value.sum(), ours)[0])
    assert float(pull[0].abs().min()) > 1
    torch.testing.assert_close(pull[0], pull[1])


def test_many_tokens_in_half_precision_are_summed_in_float64() -> None:
    """Pitfall h: 4000 log-probabilities in bfloat16; a sum in their own type is off by whole nats."""
    length = 4000
    tokens = (-2 * torch.rand(2, length, generator=torch.Generator().manual_seed(0))).bfloat16()
    batch = pairs_of(torch.zeros(1, 2), torch.zeros(1, 2), lengths=(length, length))
    batch.predictions.values = tokens  # type: ignore[union-attr]
    found = preference(batch, "reverse_kl", 1.0).seen["log_ratio_chosen"][0]
    assert float(found) == pytest.approx(math.fsum(tokens[0].tolist()), rel=1e-12)
    running = tokens[0].cumsum(0, dtype=torch.bfloat16)[-1]
    assert abs(float(running) - float(found)) > 1


# Pairs as others store them


def turns(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


SHAPES: dict[str, Any] = {
    "text": lambda row: row,
    "turns with a prompt": lambda row: {
        "prompt": turns("user", row["prompt"]),
        "chosen": turns("assistant", row["chosen"]),
        "rejected": turns("assistant", row["rejected"]),
    },
    "whole conversations": lambda row: {
        side: turns("user", row["prompt"]) + turns("assistant", row[side]) for side in ("chosen", "rejected")
    },
    "both": lambda row: {
        "prompt": turns("user", row["prompt"]),
        **{side: turns("user", row["prompt"]) + turns("assistant", row[side]) for side in ("chosen", "rejected")},
    },
    "text prompt, conversations": lambda row: {
        "prompt": row["prompt"],
        **{side: turns("user", row["prompt"]) + turns("assistant", row[side]) for side in ("chosen", "rejected")},
    },
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("store", ["list", "dataset", "splits", "jsonl", "parquet", "directory", "saved"])
def test_pairs_in_every_shape_from_every_store(tmp_path: Any, shape: str, store: str) -> None:
    """A directory of files is opened by `datasets.load_dataset`, as a name on the hub is."""
    datasets = pytest.importorskip("datasets")
    rows = [SHAPES[shape](row) for row in ROWS]
    data = datasets.Dataset.from_list(rows)
    spec: Any = {"list": rows, "dataset": data, "splits": datasets.DatasetDict({"train": data})}.get(store)
    if store in ("jsonl", "parquet"):
        spec = str(tmp_path / f"pairs.{store}")
        data.to_json(spec) if store == "jsonl" else data.to_parquet(spec)
    elif store == "directory":
        data.to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
        spec = str(tmp_path)
    elif store == "saved":
        datasets.DatasetDict({"train": data}).save_to_disk(tmp_path)
        spec = str(tmp_path)
    task = load_task(spec, seed=0)
    assert [(p.messages[-1]["content"], p.reply[0]["content"], p.rejected[0]["content"]) for p in task.train] == [  # type: ignore[index]
        (row["prompt"], row["chosen"], row["rejected"]) for row in ROWS
    ]


def test_pairs_in_columns_of_other_names() -> None:
    rows = [{"instruction": row["prompt"], "better": row["chosen"], "worse": row["rejected"]} for row in ROWS]
    columns = {"prompt": "instruction", "chosen": "better", "rejected": "worse"}
    problem = load_task({"data": rows, "columns": columns}, seed=0).train[0]
    assert (problem.reply, problem.rejected) == (
        turns("assistant", ROWS[0]["chosen"]),
        turns("assistant", ROWS[0]["rejected"]),
    )
