"""Master key filters: collect depthwise filters, fit them to the eight keys they are copies of, compute with those.

>>> keys = mkf.keys.paper8()
>>> bank = mkf.FilterBank.from_model(model)
>>> fit = mkf.affine_fit(bank, keys)  # .index .scale .shift .residual
>>> layer = mkf.KeyConv2d.from_conv2d(conv, keys)  # a depthwise convolution that knows its filters are keys

What is asked for is imported then. Whoever needs torch's operators `torch.ops.mkf` alone, as to load a program that
`torch.export` has saved, writes `import mkf.ops`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkf import analysis, bank, keys, nn, ops, search
    from mkf.bank import FilterBank
    from mkf.keys import KeySet
    from mkf.nn import KeyConv2d, conversion_report, convert, restore
    from mkf.ops import AffineFit, FitStatistics, affine_fit, fit_statistics
else:
    from mkf._lazy import importer

    __getattr__, __dir__ = importer(
        __name__,
        {
            "bank": ["FilterBank"],
            "keys": ["KeySet"],
            "nn": ["KeyConv2d", "conversion_report", "convert", "restore"],
            "ops": ["AffineFit", "FitStatistics", "affine_fit", "fit_statistics"],
        },
        ["analysis", "bank", "keys", "nn", "ops", "search"],
    )

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
