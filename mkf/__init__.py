"""Master key filters: collect depthwise filters and fit them to the eight keys they are copies of.

>>> keys = mkf.keys.paper8()
>>> bank = mkf.FilterBank.from_model(model)
>>> fit = mkf.affine_fit(bank, keys)  # .index .scale .shift .residual
"""

from mkf import bank, keys, ops, search
from mkf.bank import FilterBank
from mkf.keys import KeySet
from mkf.ops import AffineFit, FitStatistics, affine_fit, fit_statistics

__version__ = "0.1.0"
__all__ = [
    "AffineFit",
    "FilterBank",
    "FitStatistics",
    "KeySet",
    "affine_fit",
    "bank",
    "fit_statistics",
    "keys",
    "ops",
    "search",
]
