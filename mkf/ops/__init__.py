"""What each operator computes and refuses, its registration with torch.library, and the choice of an implementation."""

from mkf.ops.affine_fit import AffineFit, affine_fit
from mkf.ops.fit_statistics import FitStatistics, fit_statistics

__all__ = ["AffineFit", "FitStatistics", "affine_fit", "fit_statistics"]
