"""What other libraries' parameters mean here: each function takes a peer's setting and returns the same divergence.

Target is always the teacher, reference or data, model the student or policy, and the scale is the peer's own: times
its coefficient it is the peer's loss per token. Factors outside the divergence (DistillKit's temperature ** 2,
everybody's own token count) are not part of it. The table was checked against TRL 1.16.0, Liger 0.8.5 and the sources
of DistillKit, disco and FastGen; the tests repeat the check against those that are installed.

>>> print(trl_gkd(0.1), "|", trl_dpo("alpha_divergence", 0.3), "|", trl_dpo_legacy("alpha_divergence", 0.3))
jsd(0.1) | alpha(0.7) | alpha(0.3)
"""

from __future__ import annotations

from kullback.divergence.curves import FDivergence
from kullback.divergence.members import complement
from kullback.divergence.parse import divergence

__all__ = ["disco", "distillkit", "f_dpo", "fastgen", "liger_jsd", "trl_dpo", "trl_dpo_legacy", "trl_gkd"]


def trl_gkd(beta: float) -> FDivergence:
    """TRL's GKD and distillation trainers, and ms-swift: beta = 0 forward KL, 1 reverse KL, between them jsd(beta).

    The two ends are not limits of the middle: at 0.999 the loss is a thousand times smaller than at 1. The knob without
    that jump is `unit(jsd(beta))`.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta}: must be in [0, 1]; 0.5 is the Jensen-Shannon divergence")
    if beta in (0, 1):
        return divergence("reverse_kl" if beta else "forward_kl")
    return divergence(f"jsd({beta!r})")


def liger_jsd(beta: float) -> FDivergence:
    """Liger's (fused linear) JSD: beta as in `trl_gkd`. Its `weight_soft_loss` is a coefficient in front."""
    return trl_gkd(beta)


def trl_dpo(f_divergence_type: str, coef: float = 0.5) -> FDivergence:
    """TRL's DPO (1.16): `reverse_kl`, `forward_kl`, `js_divergence`, or `alpha_divergence` with its coefficient.

    A response scores link(log reference - log policy), up to a constant that cancels in the pair. TRL's alpha link is
    (z^(coef - 1) - 1) / (coef - 1) with z = policy / reference, so 1 is reverse KL, 0 forward KL and our alpha is
    1 - coef. Its js is twice the Jensen-Shannon divergence.
    """
    if f_divergence_type == "alpha_divergence":
        return _alpha(complement(coef))
    table = {"reverse_kl": "reverse_kl", "forward_kl": "forward_kl", "js_divergence": "2*jsd(0.5)"}
    return _one_of("f_divergence_type", f_divergence_type, table, "alpha_divergence")


def trl_dpo_legacy(f_divergence_type: str, coef: float = 1.0) -> FDivergence:
    """TRL's DPO before the exponent changed, and ms-swift today: our alpha is coef, the link -z^(-coef) / coef.

    The two conventions agree only at 0.5; an upgrade with coef = 0.3 silently trains alpha(0.7).
    """
    if f_divergence_type == "alpha_divergence":
        return _alpha(coef)
    table = {"reverse_kl": "reverse_kl", "js_divergence": "2*jsd(0.5)"}
    return _one_of("f_divergence_type", f_divergence_type, table, "alpha_divergence")


def f_dpo(name: str, alpha: float = 0.5) -> FDivergence:
    """The official f-DPO code: `reverse_kl`, `forward_kl`, `jsd` (twice the Jensen-Shannon one), `alpha_divergence`."""
    if name == "alpha_divergence":
        return _alpha(alpha)
    table = {"reverse_kl": "reverse_kl", "forward_kl": "forward_kl", "jsd": "2*jsd(0.5)"}
    return _one_of("name", name, table, "alpha_divergence")


def distillkit(name: str) -> FDivergence:
    """DistillKit: `kl` is forward KL, `jsd` the Jensen-Shannon divergence, `tvd` total variation with its 1/2.

    It multiplies each by temperature ** 2; we never do. Its `symmetric_uniform` tail is our `tail="bucket"`.
    """
    return _one_of("name", name, {"kl": "forward_kl", "jsd": "jsd(0.5)", "tvd": "tv"})


def fastgen(f_div: str) -> FDivergence:
    """FastGen's f-distill: its weight of the score difference, as a function of r = data / student, is our `curvature`.

    rkl 1, kl r, js r / (1 + r), jf 1 + r, sh sqrt(r), neyman 1 / r, sf 1 / (1 + r). The scale is that of its code, in
    which `sh` is four times and `neyman` half the textbook divergence.
    """
    table = {
        "rkl": "reverse_kl",
        "kl": "forward_kl",
        "js": "2*jsd(0.5)",
        "jf": "jeffreys",
        "sh": "unit(squared_hellinger)",
        "neyman": "unit(neyman_chi2)",
        "sf": "2*skew(reverse_kl, 0.5)",
    }
    return _one_of("f_div", f_div, table)


def disco(loss: str) -> FDivergence:
    """disco's f-DPG losses by class name: f'(policy / target) of its code is our link up to a constant.

    `ChiSquaredLoss` and `ReverseChiSquaredLoss` as corrected in late 2025 (chi2(target || policy) and the reverse).
    """
    table = {
        "KLLoss": "forward_kl",
        "ReverseKLLoss": "reverse_kl",
        "TVLoss": "tv",
        "JSLoss": "2*jsd(0.5)",
        "ChiSquaredLoss": "pearson_chi2",
        "ReverseChiSquaredLoss": "neyman_chi2",
    }
    return _one_of("loss", loss, table)


def _alpha(a: float) -> FDivergence:
    if a in (0, 1):
        return divergence("forward_kl" if a else "reverse_kl")
    return divergence(f"alpha({a!r})")


def _one_of(field: str, value: str, table: dict[str, str], *more: str) -> FDivergence:
    if value not in table:
        raise ValueError(f'{field}="{value}": choose one of {", ".join([*table, *more])}')
    return divergence(table[value])
