"""KeyConv2d: a depthwise convolution whose filters are scaled and shifted copies of a few shared keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized

from mkf.bank.compact import KEYS
from mkf.kernels.key_conv2d.plan import check_tolerance
from mkf.kernels.registry import named
from mkf.keys import KeySet
from mkf.nn.assign import Order, assign_keys
from mkf.ops import AffineFit, affine_fit, explain_key_conv2d, key_conv2d, key_conv2d_layer_norm
from mkf.ops.arguments import KERNEL_SIZES
from mkf.ops.key_conv2d.check import geometry
from mkf.ops.key_conv2d.compute import filters_of
from mkf.ops.key_conv2d.eager import forget

TRAINABLE = ("scale", "shift", "bias", "keys")

torch.fx.wrap("key_conv2d")  # a graph of torch.fx holds the call, not what it is made of


class FusedLayerNorm(nn.LayerNorm):
    """A LayerNorm that the `KeyConv2d` before it computes: what arrives here is normalised already, and is passed on.

    It is what `KeyConv2d.fuse_norm` makes of a norm's class, as torch makes another of a parametrised module's: the
    norm keeps its parameters and its place.

    Attributes:
        class_before: The class it had.
        computed: Whether the layer did, at its last call; None before the first.
    """

    class_before: type[nn.LayerNorm]
    computed: bool | None

    def forward(self, input: Tensor) -> Tensor:
        """The input, or its LayerNorm where the layer has left that to this module."""
        # A tracer of torch.fx that comes here first has taken the layer for a whole, which will compute the norm.
        will = self.computed is None and isinstance(input, Proxy)
        return input if self.computed or will else self.class_before.forward(self, input)

    def _replicate_for_data_parallel(self) -> Self:
        replica: Self = super()._replicate_for_data_parallel()
        vars(replica)["computed"] = False  # the replica of the layer has lost sight of it
        return replica


class KeyConv2d(nn.Module):
    """A depthwise convolution with shared keys, a drop-in for `nn.Conv2d(channels, channels, k, groups=channels)`.

        out[n, c] = conv(x[n, c], scale[c] * keys[index[c]] + shift[c]) + bias[c]

    It computes what that convolution does with `weight` as its filters, and has its attributes, but stores K keys and
    four numbers a channel. `mkf.ops.key_conv2d` tells what makes it fast and what it accepts; `explain(x)` tells what
    would run. A layer made this way is one to train from scratch: scale 1, shift 0 and bias 0, so that a filter is its
    key, of norm 1 about its mean. `from_conv2d` fits the filters of an existing layer instead.

    What trains is a choice. The paper's text has frozen keys, a learnable scalar in every tap and the ordinary bias,
    `train=("shift", "bias")`; its answers to reviewers have no linear shift, `train=("bias",)`. The initial values,
    which the paper does not publish, are ours.

    It is no subclass of `nn.Conv2d`, and `weight` is computed at each call: writing to it, as `torch.nn.init` does,
    changes nothing. Take filters over with `fit_weight`, and do what needs a weight that is stored, such as pruning,
    weight norm or torch's fusion with a batch norm, to what `to_conv2d` or `mkf.restore` returns.

    The state is `keys` (K, k, k), `index` (C,) int32, and `scale`, `shift` and `bias` (C,). Writing to them in place
    takes effect at the next forward. The keys stay float32 whatever dtype the layer is converted to, because rounded
    keys are no longer separable. A layer on the meta device has no values: load a state after `to_empty`.

    Moving averages of weights must copy what does not train, as timm's `ModelEmaV3` and torch's `AveragedModel` do.
    Averaged in floating point, as by timm's `ModelEmaV2` or `AveragedModel(use_buffers=True)`, `index` is cut to the
    integer below, another key, and keys lose their separability.

    `DistributedDataParallel` with its default `broadcast_buffers=True` writes to keys and index before every forward
    pass: on a GPU they are then read again each time, which waits for it. Nothing needs it: give False.

    Args:
        channels: C, of the input and of the output.
        kernel_size: k, which the keys must have too.
        keys: A `KeySet`, or (K, k, k) of which one can be made.
        stride: One number, or vertical and horizontal. Fast are 1 and 2.
        padding: Zeros on every side: one number, a pair, "same" (stride 1) or "valid". Fast is k // 2, that is "same".
        dilation: One number, or vertical and horizontal. Fast is 1.
        bias: Whether there is a bias.
        assign: Which share of the channels each key gets: "uniform", or K proportions.
        order: "blocks" of channels with the same key, which is faster, or "random".
        rotation: The key of the first block; let it go up from layer to layer. See `mkf.nn.assign.assign_keys`.
        generator: For `order="random"`; torch's global one if None.
        train: What has gradients, of "scale", "shift", "bias" and "keys".
        padding_mode: "zeros", the only one there is.
        backend: Name of an implementation; automatic if None.
        tolerance: Relative L2 error allowed in a key where that makes it cheaper; see `KeySet.plan`.
        device: Where the layer is made.
        dtype: Of scale, shift and bias.

    Raises:
        ValueError: Something that is no keys, keys of another size, or options that are none.
        TypeError: A dtype that is no floating-point one.
    """

    keys: Tensor
    index: Tensor
    norm: FusedLayerNorm | None = None  # what `fuse_norm` was given

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        keys: KeySet | Tensor,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        assign: str | Sequence[float] = "uniform",
        order: Order = "blocks",
        rotation: int = 0,
        generator: torch.Generator | None = None,
        train: Iterable[str] = ("shift", "bias"),
        padding_mode: str = "zeros",
        backend: str | None = None,
        tolerance: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        keys = keys if isinstance(keys, KeySet) else KeySet(keys)
        k = keys.kernel_size
        self.kernel_size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        if self.kernel_size != (k, k):
            size = "x".join(map(str, self.kernel_size))
            there_are = self.kernel_size[0] == self.kernel_size[1] and self.kernel_size[0] in KERNEL_SIZES
            advice = "give keys of its size" if there_are else "there are no keys of its size"
            raise ValueError(f"the layer is {size}, the keys are {k}x{k}: {advice}")
        if padding_mode != "zeros":
            raise ValueError(f"padding_mode={padding_mode!r}: KeyConv2d pads with zeros only")
        if not isinstance(channels, int) or channels < 1:
            raise ValueError(f"channels={channels!r}: expected a whole number of 1 or more")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype={dtype}: scale, shift and bias are floating-point numbers")
        check_tolerance(tolerance)
        if backend is not None:
            named("key_conv2d", backend)
        self.in_channels = self.out_channels = self.groups = channels
        self.stride, zeros, self.dilation = geometry(k, stride, padding, dilation)
        self.padding = padding if isinstance(padding, str) else zeros
        self.padding_mode = padding_mode
        self.transposed = False
        self.output_padding = (0, 0)
        self.backend = backend
        self.tolerance = tolerance
        self.key_names = keys.names
        self.residual: Tensor | None = None  # of each channel's fit, (C,) float32 on the CPU; not part of the state

        device = torch.get_default_device() if device is None else device
        index = assign_keys(channels, len(keys), assign, order, rotation, generator)
        self.register_buffer("keys", keys.filters.to(device))
        self.register_buffer("index", index.to(device))
        self.scale, self.shift = (nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) for _ in range(2))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()
        self.set_trainable(train)

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        keys: KeySet | Tensor,
        *,
        assign: str | Sequence[float] = "fit",
        order: Order = "blocks",
        rotation: int = 0,
        generator: torch.Generator | None = None,
        train: Iterable[str] = ("shift", "bias"),
        backend: str | None = None,
        tolerance: float = 0.0,
    ) -> Self:
        """A layer like an existing depthwise one: its size, stride, padding, dilation, device, dtype and mode.

        With `assign="fit"` each of its filters is replaced by its best scaled and shifted key (`mkf.affine_fit`), what
        that misses is in `residual`, and its bias is copied. Otherwise keys are assigned anew, to train from scratch.

        Args:
            conv: The convolution; it is not changed and shares nothing with the new layer.
            keys: As in `KeyConv2d`.
            assign: "fit", or what `KeyConv2d` takes.
            order: See `KeyConv2d`, as the rest.
            rotation: See `KeyConv2d`.
            generator: See `KeyConv2d`.
            train: See `KeyConv2d`.
            backend: See `KeyConv2d`.
            tolerance: See `KeyConv2d`.

        Raises:
            TypeError: It is no `nn.Conv2d`, or a subclass that computes otherwise.
            ValueError: It is not depthwise, has a channel multiplier, pads with something else than zeros, is not
                square or of another size than the keys, or its filters are not finite.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"from_conv2d takes an nn.Conv2d, not a {type(conv).__name__}")
        if type(conv).forward is not nn.Conv2d.forward or type(conv)._conv_forward is not nn.Conv2d._conv_forward:
            raise TypeError(f"a {type(conv).__name__} computes otherwise than nn.Conv2d, so it has no equal here")
        if conv.groups == conv.in_channels < conv.out_channels:
            multiplier = conv.out_channels // conv.in_channels
            raise ValueError(f"a channel multiplier of {multiplier}: KeyConv2d has one filter a channel")
        if not conv.groups == conv.in_channels == conv.out_channels:
            raise ValueError(
                f"not a depthwise convolution with one filter a channel: {conv.in_channels} channels in, "
                f"{conv.out_channels} out, {conv.groups} groups"
            )
        fits = isinstance(assign, str) and assign == "fit"
        if fits and conv.weight.is_meta:
            raise ValueError("the convolution is on the meta device and has no filters to fit: load its state first")
        layer = cls(
            conv.in_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            keys,
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            bias=conv.bias is not None,
            assign="uniform" if fits else assign,
            order=order,
            rotation=rotation,
            generator=generator,
            train=train,
            padding_mode=conv.padding_mode,
            backend=backend,
            tolerance=tolerance,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        if fits:
            layer.fit_weight(conv.weight, conv.bias)
        return layer.train(conv.training)

    @property
    def weight(self) -> Tensor:
        """The filters written out, (C, 1, k, k), in the dtype of `scale`; differentiable, and computed at each call."""
        dtype = torch.promote_types(self.scale.dtype, torch.float32)
        scale, shift = self.scale.to(dtype), self.shift.to(dtype)
        return filters_of(self.keys, self.index, scale, shift)[:, None].to(self.scale.dtype)

    @torch.no_grad()
    def fit_weight(self, weight: Tensor, bias: Tensor | None = None) -> AffineFit:
        """Take over the filters of an ordinary convolution, each as its best scaled and shifted key.

        Args:
            weight: (C, 1, k, k) or (C, k, k), such as `state_dict["blocks.0.conv_dw.weight"]`.
            bias: (C,); None keeps the bias.

        Returns:
            The fit; its residual is kept as `residual`.

        Raises:
            TypeError: `weight` is no tensor.
            ValueError: Another shape, filters that are not finite or beyond the layer's dtype, or a bias where the
                layer has none.
        """
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight: expected a tensor, not {type(weight).__name__}")
        filters = weight[:, 0] if weight.ndim == 4 and weight.shape[1] == 1 else weight
        if filters.shape != (self.in_channels, *self.kernel_size):
            expected = (self.in_channels, 1, *self.kernel_size)
            raise ValueError(f"weight has shape {tuple(weight.shape)}, this layer needs {expected}")
        if bias is not None and (self.bias is None or bias.shape != self.bias.shape):
            own = "no bias" if self.bias is None else f"one of shape {tuple(self.bias.shape)}"
            raise ValueError(f"bias has shape {tuple(bias.shape)}, this layer has {own}")
        fit = affine_fit(filters, self.keys)
        if (fit.index < 0).any():
            channels = (fit.index < 0).nonzero().flatten().tolist()
            raise ValueError(
                f"{len(channels)} of {len(filters)} filters hold NaN or infinity, that of channel {channels[0]} first: "
                "take a checkpoint from before the weights diverged"
            )
        largest = torch.finfo(self.scale.dtype).max
        if max(fit.scale.abs().max(), fit.shift.abs().max()) > largest:
            raise ValueError(
                f"the filters need scales or shifts beyond the {largest:.5g} that {self.scale.dtype} reaches"
            )
        self.index.copy_(fit.index)
        self.scale.copy_(fit.scale)
        self.shift.copy_(fit.shift)
        if bias is not None and self.bias is not None:
            self.bias.copy_(bias)
        self.residual = fit.residual.cpu()
        return fit

    def to_conv2d(self) -> nn.Conv2d:
        """An ordinary depthwise convolution with the filters written out, sharing nothing with this layer.

        A fused norm is not in it: the layer must part from that before the convolution can take its place.
        """
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            device="meta",
            dtype=self.scale.dtype,
        )
        conv.weight = nn.Parameter(self.weight.detach())
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone())
        return conv.train(self.training)

    def fuse(self) -> nn.Conv2d:
        """What `timm.utils.reparameterize_model` puts in the layer's place: `to_conv2d()`, for other runtimes.

        With torch, this layer is the faster one. A fused norm computes by itself again. Blocks that put their
        convolutions together themselves, as RepGhost's and EfficientViM's do, want `nn.Conv2d`: `mkf.restore` first.
        """
        self.part_norm()
        return self.to_conv2d()

    def fuse_norm(self, norm: nn.LayerNorm) -> None:
        """Compute the LayerNorm over the channels that follows this layer along with it, from now on.

        `mkf.nn.fuse_norms` and `mkf.convert` do this where they know that nothing else reads this layer's output. The
        norm stays the module and keeps the parameters that it is, but passes on what it is given; see
        `mkf.ops.key_conv2d_layer_norm` for where one pass computes both. While one of the two has hooks, or all modules
        have, each computes its own part, as do graphs of torch.fx and replicas of `DataParallel`. Undo it by
        `part_norm` before one of the two is replaced: the other would not know.

        Raises:
            TypeError: It is no LayerNorm.
            ValueError: The layer has a norm, or this one is fused or parametrised, is not over these channels, or lacks
                weight or bias.
        """
        if not isinstance(norm, nn.LayerNorm):
            raise TypeError(f"fuse_norm takes an nn.LayerNorm, not a {type(norm).__name__}")
        reason = self.why_not_norm(norm)
        if reason is not None:
            raise ValueError(reason)
        vars(norm).update(class_before=type(norm), computed=None)
        norm.__class__ = FusedLayerNorm
        vars(self)["norm"] = norm  # not as a submodule: it is one of the block that holds both

    def why_not_norm(self, norm: nn.LayerNorm) -> str | None:
        """Why `fuse_norm` would refuse a LayerNorm, or None."""
        if self.norm is not None or isinstance(norm, FusedLayerNorm):
            return "the layer or the norm is fused already: part_norm() undoes it"
        if is_parametrized(norm):
            return "the norm is parametrised: remove that first"
        if norm.normalized_shape != (self.out_channels,) or norm.weight is None or norm.bias is None:
            return f"only a LayerNorm of {self.out_channels} channels with weight and bias, not {norm}"
        return None

    def part_norm(self) -> None:
        """Undo `fuse_norm`, if there was one.

        Raises:
            ValueError: The norm was parametrised since. All is as it was.
        """
        self.check_norm()
        norm = self.norm
        if norm is None:
            return
        del vars(self)["norm"], vars(norm)["computed"]
        norm.__class__ = vars(norm).pop("class_before")

    def check_norm(self) -> None:
        """Raise what `part_norm` would."""
        if self.norm is not None and type(self.norm) is not FusedLayerNorm:
            raise ValueError("the LayerNorm that this layer computes was parametrised since: remove that first")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Scale 1, shift 0 and bias 0: each filter is its key. Keys and index stay."""
        self.residual = None
        self.scale.fill_(1)
        self.shift.zero_()
        if self.bias is not None:
            self.bias.zero_()

    def set_trainable(self, names: Iterable[str]) -> None:
        """Choose anew what has gradients, of "scale", "shift", "bias" and "keys"; make the optimiser after it.

        The keys are a parameter of the module while they train and a buffer while not. Each layer has keys of its own.

        Raises:
            ValueError: Another name.
        """
        names = (names,) if isinstance(names, str) else tuple(names)
        for name in names:
            if name not in TRAINABLE:
                raise ValueError(f"train={names!r}: choose from {', '.join(TRAINABLE)}")
        for name in ("scale", "shift", "bias"):
            parameter = getattr(self, name)
            if parameter is not None:
                parameter.requires_grad_(name in names)
        keys = self.keys.detach()
        del self.keys
        if "keys" in names:
            self.keys = nn.Parameter(keys)
        else:
            self.register_buffer("keys", keys)

    def explain(self, x: Tensor) -> str:
        """Say which implementation would convolve `x`, and why not those that are preferred to it."""
        options = self.stride, self.padding, self.dilation, self.backend, self.tolerance
        return explain_key_conv2d(x, self.keys, *options)

    def forward(self, input: Tensor) -> Tensor:  # named as by nn.Conv2d
        """Convolve (N, C, H, W) or (C, H, W); see `mkf.ops.key_conv2d`, and `key_conv2d_layer_norm` with a norm."""
        try:  # straight from their dictionaries, which saves three microseconds
            parameters: dict[str, Any] = self._parameters
            buffers: dict[str, Any] = self._buffers
            index, scale, shift, bias = buffers["index"], parameters["scale"], parameters["shift"], parameters["bias"]
            keys = buffers["keys"] if "keys" in buffers else parameters["keys"]
        except KeyError:  # somebody has put something in their place, such as a parametrisation
            keys, index, scale, shift, bias = self.keys, self.index, self.scale, self.shift, self.bias
        options = self.stride, self.padding, self.dilation, self.backend, self.tolerance
        norm = self.norm
        if norm is not None:
            seen = _is_hooked(self) or _is_hooked(norm) or _has_any_global_hook()
            fused = not (seen or isinstance(input, Proxy))
            if norm.computed != fused:
                vars(norm)["computed"] = fused
            norm = norm if fused else None
        if norm is None:
            return key_conv2d(input, keys, index, scale, shift, bias, *options)
        return key_conv2d_layer_norm(input, keys, index, scale, shift, bias, norm.weight, norm.bias, norm.eps, *options)

    def extra_repr(self) -> str:
        """Size and options, the share of the channels that each key has, and what a fit missed."""
        options = [str(self.in_channels), f"kernel_size={self.kernel_size}", f"stride={self.stride}"]
        options.append(f"padding={self.padding!r}")
        if self.dilation != (1, 1):
            options.append(f"dilation={self.dilation}")
        if self.bias is None:
            options.append("bias=False")
        if not self.index.is_meta:
            shares = torch.bincount(self.index, minlength=len(self.keys))[: len(self.keys)].tolist()
            used = [f"{name}: {n}" for name, n in zip(self.key_names, shares, strict=True) if n]
            options.append(f"channels by key: {{{', '.join(used)}}}")
        if self.norm is not None:
            options.append("computes the LayerNorm that follows")
        if self.residual is not None:
            options.append(f"mean residual={self.residual.mean():.3f}")
        return ", ".join(options)

    def _replicate_for_data_parallel(self) -> Self:
        replica: Self = super()._replicate_for_data_parallel()
        vars(replica)["norm"] = None  # it is that of the first device
        return replica

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        forget(self.scale)
        keys = self.keys.detach()
        gradient = None if self.keys.grad is None else self.keys.grad.detach()
        super()._apply(fn, recurse)
        if self.keys.dtype != torch.float32:  # moved and rounded; only the move is wanted
            self.keys.data = keys.to(self.keys.device)
            self.keys.grad = None if gradient is None else gradient.to(self.keys.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.residual = None  # what it told is no longer there
        forget(self.scale)
        if f"{prefix}scale" in state_dict and f"{prefix}keys" not in state_dict:
            error_msgs.append(
                f"{prefix}keys is missing, as in a compact state: load mkf.bank.compact.expand(state) into an "
                f"ordinary network, and convert that with the keys in state['{KEYS}']"
            )
        elif f"{prefix}weight" in state_dict and f"{prefix}keys" not in state_dict:
            error_msgs.append(
                f"{prefix}weight holds the filters of an nn.Conv2d, which keys can only approximate: take them with "
                "fit_weight(weight, bias), or load them into the nn.Conv2d and convert that by KeyConv2d.from_conv2d"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _is_hooked(module: nn.Module) -> bool:
    """Whether somebody sees or changes what goes into a module, comes out of it or goes back through it."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
