"""What each operator computes and refuses, its registration with torch.library, and the choice of an implementation."""

from mkf.ops.affine_fit import AffineFit, affine_fit

__all__ = ["AffineFit", "affine_fit"]
