"""Layers: the depthwise convolution that shared keys make cheap."""

from mkf.nn.key_conv2d import KeyConv2d

__all__ = ["KeyConv2d"]
