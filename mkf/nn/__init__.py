"""Layers: the depthwise convolution that shared keys make cheap, and networks that have it."""

from mkf.nn.conversion_report import ConversionReport, LayerReport
from mkf.nn.convert import conversion_report, convert, restore
from mkf.nn.fuse import fuse_norms, part_norms
from mkf.nn.key_conv2d import KeyConv2d

__all__ = [
    "ConversionReport",
    "KeyConv2d",
    "LayerReport",
    "conversion_report",
    "convert",
    "fuse_norms",
    "part_norms",
    "restore",
]
