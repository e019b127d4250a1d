"""What each operator computes and refuses, its registration with torch.library, and the choice of an implementation."""

from mkf.ops.affine_fit import AffineFit, affine_fit
from mkf.ops.fit_statistics import FitStatistics, fit_statistics
from mkf.ops.key_conv2d import explain_key_conv2d, key_conv2d
from mkf.ops.key_conv2d.norm import key_conv2d_layer_norm

__all__ = [
    "AffineFit",
    "FitStatistics",
    "affine_fit",
    "explain_key_conv2d",
    "fit_statistics",
    "key_conv2d",
    "key_conv2d_layer_norm",
]
