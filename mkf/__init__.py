"""Master key filters: collect depthwise filters, fit them to the eight keys they are copies of, compute with those.

>>> keys = mkf.keys.paper8()
>>> bank = mkf.FilterBank.from_model(model)
>>> fit = mkf.affine_fit(bank, keys)  # .index .scale .shift .residual
>>> layer = mkf.KeyConv2d.from_conv2d(conv, keys)  # a depthwise convolution that knows its filters are keys
"""

from mkf import analysis, bank, keys, nn, ops, search
from mkf.bank import FilterBank
from mkf.keys import KeySet
from mkf.nn import KeyConv2d, conversion_report, convert, restore
from mkf.ops import AffineFit, FitStatistics, affine_fit, fit_statistics

__version__ = "0.1.0"
__all__ = [
    "AffineFit",
    "FilterBank",
    "FitStatistics",
    "KeyConv2d",
    "KeySet",
    "affine_fit",
    "analysis",
    "bank",
    "conversion_report",
    "convert",
    "fit_statistics",
    "keys",
    "nn",
    "ops",
    "restore",
    "search",
]
