"""Closed forms and asymptotics on finite outcome sets, where every expectation is a sum.

`tabular` is the laboratory: exact expectations, optima under any divergence, losses and gradients. `alignment` is what
paper 24 says of best-of-N and the optimum under a KL budget. Neither knows of language models.
"""

from kullback.theory import alignment, tabular

__all__ = ["alignment", "tabular"]
