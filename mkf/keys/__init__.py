"""Keys: the few filters that all depthwise filters of a trained network are close to.

keys = mkf.keys.paper8()  # the eight keys of the paper, as printed
keys = mkf.keys.analytic("B")  # the same eight as derivatives of discrete Gaussians
keys = mkf.keys.random(k=7, n=8)  # white noise, the control
keys = mkf.KeySet.load("keys.safetensors")  # somebody's, or yours after `keys.save(...)`
keys = mkf.KeySet(filters)  # any (K, k, k) array
"""

from mkf.kernels.key_conv2d.structure import Structure, Tap
from mkf.keys.control import random
from mkf.keys.gaussian import analytic
from mkf.keys.key_set import KeySet
from mkf.keys.published import paper8
from mkf.keys.spec import parse

__all__ = ["KeySet", "Structure", "Tap", "analytic", "paper8", "parse", "random"]
