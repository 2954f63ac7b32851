"""How much each noised sample counts: h(r) = r^2 f''(r), the curvature of the divergence, and its normalisation.

    log ratio  ->  clip  ->  1. divide r by its running mean in the bin of sigma  ->  h(r)  ->  2. divide by its mean

r = target / model at the noised sample. Stage 1: E_model[r] = 1 at every level, so a bin's mean is an error of the
discriminator (and of the clip, which moves the mean of an exact ratio too). Stage 2 takes out the scale of f.

Source: Xu et al., arXiv 2502.15681; constants as in its released code, which bins in sigma. Here bins are even in
log sigma unless said otherwise: on the EDM grid 64 % of all samples fall into the first of ten bins in sigma.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kullback.diffusion.noise import Noise, Spacing
from kullback.divergence import FDivergence
from kullback.run.processes import sum_over_ranks

LOGIT = 10.0  # logits are held in [-10, 10] before anything else
SMALL = 1e-6


class RatioWeights(nn.Module):
    """Log-ratios to weights. The means of stage 1 are its only state, a buffer, and so in every checkpoint.

    Args:
        clip: lowest and highest ratio; None leaves logits alone but for [-10, 10].
        bins, ema, spacing: of stage 1: how many, the share of the old mean that is kept, and what they are even in.
        stage1, stage2: switch them off to see what they do.

    Attributes:
        clipped, seen: how many log-ratios were cut by clip or logit bound so far, of how many. A saturated
            discriminator shows here: its ratios say nothing.
    """

    means: Tensor
    clipped: Tensor
    seen: Tensor

    def __init__(
        self,
        divergence: FDivergence,
        noise: Noise,
        *,
        clip: tuple[float, float] | None = (0.1, 20.0),
        bins: int = 10,
        ema: float = 0.9,
        spacing: Spacing = "log_sigma",
        stage1: bool = True,
        stage2: bool = True,
    ) -> None:
        super().__init__()
        if not divergence.smooth:
            raise ValueError(
                f'divergence="{divergence}": its curvature is zero wherever it exists, so nothing would move'
            )
        if clip is not None and not 0 < clip[0] < 1 < clip[1]:
            raise ValueError(f"clip={clip}: needs 0 < low < 1 < high")
        if not 0 <= ema < 1 or bins < 1:
            raise ValueError(f"ema={ema}, bins={bins}: needs 0 <= ema < 1 and at least one bin")
        self.divergence, self.noise, self.clip = divergence, noise, clip
        self.ema, self.spacing, self.stage1, self.stage2 = ema, spacing, stage1, stage2
        self.register_buffer("means", torch.ones(bins))
        self.register_buffer("clipped", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(
        self, log_ratio: Float[Tensor, "row"], sigma: Float[Tensor, "row"]
    ) -> tuple[Float[Tensor, "row"], Float[Tensor, "row"]]:
        """(h, log ratio after clip and stage 1), both detached. Updates the means, over all processes.

        Raises:
            ValueError: a log-ratio is nan.
        """
        log_ratio = log_ratio.detach()
        log_ratio = log_ratio if log_ratio.dtype == torch.float64 else log_ratio.float()
        if log_ratio.isnan().any():
            raise ValueError(f"{int(log_ratio.isnan().sum())} of {len(log_ratio)} log-ratios are nan: lower the rate")
        low, high = (-LOGIT, LOGIT) if self.clip is None else (math.log(self.clip[0]), math.log(self.clip[1]))
        held = log_ratio.clamp(low, high)
        self.clipped += (held != log_ratio).sum()
        self.seen += len(log_ratio)
        if self.stage1:
            which = self.noise.bins(sigma, len(self.means), self.spacing)
            ratio = held.exp()
            total = sum_over_ranks(torch.zeros_like(self.means).to(ratio).index_add_(0, which, ratio))
            count = sum_over_ranks(torch.zeros_like(total).index_add_(0, which, torch.ones_like(ratio)))
            fresh = self.ema * self.means + (1 - self.ema) * total / count.clamp(min=1)
            self.means.copy_(torch.where(count > 0, fresh, self.means.to(fresh)))
            held = held - torch.log(self.means.to(held)[which] + SMALL)
        h = self.divergence.curvature(held)
        if self.stage2:
            total = sum_over_ranks(torch.stack([h.sum(), h.new_tensor(float(len(h)))]))
            h = h / (total[0] / total[1] + SMALL)
        return h, held
