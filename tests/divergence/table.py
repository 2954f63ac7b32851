"""The table every property is tested on: each named divergence, off-centre parameters, composites and users' own."""

import torch

from kullback.divergence import FDivergence, divergence, divergences

NAMED = [
    "forward_kl",
    "reverse_kl",
    "jeffreys",
    "jsd(0.5)",
    "jsd(0.1)",
    "jsd(0.9)",
    "skew_kl(0.1)",
    "skew_kl(0.7)",
    "skew_reverse_kl(0.1)",
    "alpha(-0.5)",
    "alpha(0.3)",
    "alpha(0.8)",
    "alpha(1.7)",
    "alpha(3)",
    "squared_hellinger",
    "tv",
    "pearson_chi2",
    "neyman_chi2",
    "chi2_kl",
    "le_cam",
]
COMPOSITE = [
    "unit(jsd(0.1))",
    "unit(skew_reverse_kl(0.3))",
    "0.7*forward_kl + 0.3*reverse_kl",
    "reversed(chi2_kl)",
    "skew(reverse_kl, 0.2)",
    "skew(le_cam, 0.4)",
    "2*skew(0.5*tv + jeffreys, 0.3)",
    "reversed(skew(chi2_kl, 0.1))",
]
OWN = {
    "own_square": FDivergence.from_generator(lambda u: (u - 1) ** 2, name="own_square"),
    "own_log": FDivergence.from_generator(lambda u: -torch.log(u), name="own_log"),
    "own_softened": FDivergence.from_generator(lambda u: (u + 1) * torch.log((u + 1) / (2 * u)), name="own_softened"),
}

# Textbook generators, typed from the definitions: independent of the log-space formulas under test.
GENERATORS = (
    {
        "forward_kl": lambda u: u * u.log(),
        "reverse_kl": lambda u: -u.log(),
        "jeffreys": lambda u: (u - 1) * u.log(),
        "squared_hellinger": lambda u: 1 - u.sqrt(),
        "tv": lambda u: (u - 1).abs() / 2,
        "pearson_chi2": lambda u: (u - 1) ** 2,
        "neyman_chi2": lambda u: (1 - u) ** 2 / u,
        "chi2_kl": lambda u: (1 - u) ** 2 / (2 * u) - u.log(),
        "le_cam": lambda u: (1 - u) ** 2 / (2 * (1 + u)),
        "own_square": lambda u: (u - 1) ** 2,
        "own_log": lambda u: -u.log(),
        "own_softened": lambda u: (u + 1) * ((u + 1) / (2 * u)).log(),
    }
    | {f"alpha({a:g})": (lambda u, a=a: (u**a - (1 - a) - a * u) / (a * (a - 1))) for a in (-0.5, 0.3, 0.8, 1.7, 3)}
    | {
        f"jsd({b})": (lambda u, b=b: b * u * (u / (b * u + 1 - b)).log() - (1 - b) * (b * u + 1 - b).log())
        for b in (0.5, 0.1, 0.9)
    }
    | {
        "skew_kl(0.1)": lambda u: u * (u / (0.1 * u + 0.9)).log(),
        "skew_kl(0.7)": lambda u: u * (u / (0.7 * u + 0.3)).log(),
        "skew_reverse_kl(0.1)": lambda u: -(0.1 + 0.9 * u).log(),
    }
)

TABLE = {name: divergence(name) for name in NAMED + COMPOSITE} | OWN
SMOOTH = [name for name, d in TABLE.items() if d.smooth]
assert len(TABLE) == 31
assert {d.split("(")[0] for d in NAMED} == set(divergences()), "a new member needs a row here"


def centred(name, u):
    """f(u) - f'(1) (u - 1) from the textbook generator by autodiff."""
    f = GENERATORS[name]
    one = torch.ones((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(f(one), one)
    return f(u) - slope * (u - 1)
