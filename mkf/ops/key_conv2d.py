"""The key convolution: a depthwise convolution whose filters are scaled and shifted copies of a few shared keys."""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from mkf.kernels.derived import Derived
from mkf.kernels.key_conv2d import KeyPlan
from mkf.kernels.key_conv2d.plan import plan_of
from mkf.kernels.key_conv2d.reference import weight_gradient
from mkf.kernels.registry import choose, passed_over

KERNEL_SIZES = (3, 5, 7, 9, 11)
MAX_KEYS = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)

PLAIN = frozenset((Tensor, Parameter, type(None)))

Pair = tuple[int, int]


def key_conv2d(
    x: Tensor,
    keys: Any,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    backend: str | None = None,
    tolerance: float = 0.0,
) -> Tensor:
    """Convolve every channel with its own filter, a scaled and shifted key.

        out[n, c] = conv(x[n, c], scale[c] * keys[index[c]] + shift[c]) + bias[c]

    This equals `torch.nn.functional.conv2d(x, weight, bias, ..., groups=C)` with those filters as the weight, up to
    rounding. It is faster because keys are shared and few: each is taken once as the cheapest sum of separable terms, a
    box, which the shift joins, and a tap (`KeySet.plan` shows it), and because the gradients of scale, shift and bias
    need no gradient of k * k taps. Sums are float32 or better. What the fast implementations do not serve, PyTorch's
    own convolution does, silently; `explain_key_conv2d` tells which would run and why no faster one does.

    Args:
        x: (N, C, H, W) or (C, H, W); float32, bfloat16, float16, or float64, which only the reference serves. Any
            strides; a channels-last input gives a channels-last output. N may be 0. Under autocast x is cast to the
            autocast dtype, the parameters are not.
        keys: (K, k, k), a `KeySet` or a tensor; k odd, 3 to 11, 1 <= K <= 256. A tensor that requires a gradient is
            used as it is, tap by tap.
        index: (C,) integers in [0, K), the key of each channel.
        scale: (C,), finite; float32 or of the dtype of x.
        shift: (C,), finite; float32 or of the dtype of x.
        bias: (C,), or None; float32 or of the dtype of x.
        stride: One number, or vertical and horizontal.
        padding: Rows and columns of zeros on every side; one number, a pair, "valid" (none) or "same" (the output has
            the size of the input; stride 1 only).
        dilation: One number, or vertical and horizontal.
        backend: Name of an implementation (`mkf env` lists them); automatic if None, or as `MKF_BACKEND` says.
        tolerance: The largest relative L2 error in a key that is allowed where it makes it cheaper; 0 for exact, that
            is to float32 rounding. The reference is always exact.

    Returns:
        (N, C, H', W') or (C, H', W') of the dtype of x, H' = (H + 2 * padding - dilation * (k - 1) - 1) // stride + 1.
        It has derivatives with respect to x, scale, shift, bias and keys given as a tensor. Where the fast
        implementations run, the first ones are deterministic, on the CPU also whatever the number of threads; second
        ones, forward mode and torch.func take PyTorch's convolution.

    Raises:
        ValueError: Shapes that do not fit together, an index out of range, a scale or shift or key that is not finite,
            an input smaller than the filter. On a GPU, index and keys are looked at when they are new or were written
            to, scale and shift never: that would wait for the GPU at every step of training.
        TypeError: Dtypes that are no floating-point numbers or do not go together.
        BackendError: The implementation asked for cannot run there, or cannot serve this call.
    """
    x, keys, index, scale, shift, bias, options = _prepare(
        x, keys, index, scale, shift, bias, stride, padding, dilation, tolerance, backend
    )
    arguments = (x if x.ndim == 4 else x[None], keys, index, scale, shift, bias, *options)
    if _is_transformed():
        out: Tensor = _written_out(*arguments)
    elif not _is_plain(x, keys, index, scale, shift, bias):
        out = torch.ops.mkf.key_conv2d(*arguments)
    elif torch.is_grad_enabled() and (
        x.requires_grad
        or shift.requires_grad
        or scale.requires_grad
        or keys.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        out = _KeyConv2d.apply(*arguments)
    else:
        out, _ = _forward(*arguments)
    return out if x.ndim == 4 else out[0]


def explain_key_conv2d(
    x: Tensor,
    keys: Any,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    backend: str | None = None,
    tolerance: float = 0.0,
) -> str:
    """Say which implementation `key_conv2d` would run, and why not those that are preferred to it.

    The arguments are those of `key_conv2d` and refused alike. Nothing is computed.
    """
    c = x.shape[-3] if isinstance(x, Tensor) and x.ndim in (3, 4) else 0
    index, scale = torch.zeros(c, dtype=torch.int32), torch.zeros(c)  # any
    if isinstance(x, Tensor):
        index, scale = index.to(x.device), scale.to(x.device)
    x, q, *_, (stride, padding, dilation, planned, backend) = _prepare(
        x, keys, index, scale, scale, None, stride, padding, dilation, tolerance, backend
    )
    x = _dense(x if x.ndim == 4 else x[None])
    plan = plan_of(q.contiguous(), planned)

    def why_not_call(module: ModuleType) -> str | None:
        reason: str | None = module.why_not_call(x, plan, stride, padding, dilation)
        return reason

    chosen = choose("key_conv2d", x.device, backend, why_not_call)
    reasons = passed_over("key_conv2d", x.device, chosen, why_not_call)
    return "; ".join([f"{chosen.name}: {chosen.description}", *(f"not {name}: {why}" for name, why in reasons.items())])


class _Checked(NamedTuple):
    """What `_check` makes of the arguments.

    Attributes:
        stride: Vertical, horizontal.
        padding: Rows and columns of zeros on every side.
        dilation: Vertical, horizontal.
        dtype: Of the parameters in the computation.
        converts: Whether a parameter has another dtype, or the index is not int32.
    """

    stride: Pair
    padding: Pair
    dilation: Pair
    dtype: torch.dtype
    converts: bool


_Described = tuple[Sequence[int], torch.dtype, torch.device]
"""A tensor as far as its values do not matter."""


def _prepare(
    x: Tensor,
    keys: Any,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    tolerance: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, tuple[Any, ...]]:
    """Check all but values and bring the tensors to the dtypes of the computation; with them come the options."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, not {type(x).__name__}")
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    if not isinstance(keys, Tensor) and hasattr(keys, "filters"):
        keys = _filters(keys, x.device)
    if not (isinstance(keys, Tensor) and isinstance(index, Tensor)):
        _refuse_types(keys, index=index)
    if not (isinstance(scale, Tensor) and isinstance(shift, Tensor) and (bias is None or isinstance(bias, Tensor))):
        _refuse_types(keys, scale=scale, shift=shift, bias=bias)
    tensors = (
        (x.shape, x.dtype, x.device),
        (keys.shape, keys.dtype, keys.device),
        (index.shape, index.dtype, index.device),
        (scale.shape, scale.dtype, scale.device),
        (shift.shape, shift.dtype, shift.device),
        None if bias is None else (bias.shape, bias.dtype, bias.device),
    )
    if x.layout is not torch.strided:
        raise TypeError(f"x is not a dense tensor but {x.layout}")
    if torch.compiler.is_compiling():
        checked = _check.__wrapped__(*tensors, stride, padding, dilation)
    else:
        if not (type(stride) is type(padding) is type(dilation) is tuple):
            stride, padding, dilation = _hashable(stride), _hashable(padding), _hashable(dilation)
        checked = _check(*tensors, stride, padding, dilation)
    if checked.converts:
        index = index.clamp(-1, keys.shape[0]).to(torch.int32)  # what is out of range stays so
        keys, scale, shift = keys.to(checked.dtype), scale.to(checked.dtype), shift.to(checked.dtype)
        bias = None if bias is None else bias.to(checked.dtype)
    options = (
        checked.stride,
        checked.padding,
        checked.dilation,
        None if keys.requires_grad else tolerance,
        backend or "",
    )
    return x, keys, index, scale, shift, bias, options


def _refuse_types(keys: Any, **parameters: Any) -> None:
    if not isinstance(keys, Tensor):
        raise TypeError(f"keys: expected a KeySet or a tensor, not {type(keys).__name__}")
    for name, value in parameters.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, not {type(value).__name__}")


@lru_cache(64)
def _filters(keys: Any, device: torch.device) -> Tensor:
    filters: Tensor = keys.filters
    return filters.to(device)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@lru_cache(4096)
def _check(
    x: _Described,
    keys: _Described,
    index: _Described,
    scale: _Described,
    shift: _Described,
    bias: _Described | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
) -> _Checked:
    """Refuse what does not fit together. Cached, as the answer for a layer is nearly always the same."""
    shape, dtype, device = x
    if dtype not in DTYPES:
        raise TypeError(f"x is {dtype}: convert it to float32, bfloat16, float16 or float64")
    if len(shape) not in (3, 4) or 0 in shape[-3:]:
        raise ValueError(f"x has shape {tuple(shape)}: expected (N, C, H, W) or (C, H, W); only N may be 0")
    channels, height, width = shape[-3:]

    keys_shape, keys_dtype, keys_device = keys
    if len(keys_shape) != 3 or keys_shape[1] != keys_shape[2] or keys_shape[2] not in KERNEL_SIZES:
        raise ValueError(f"keys have shape {tuple(keys_shape)}: expected (K, k, k) with k one of {KERNEL_SIZES}")
    count, k = int(keys_shape[0]), int(keys_shape[2])
    if not 1 <= count <= MAX_KEYS:
        raise ValueError(f"there are {count} keys: expected 1 to {MAX_KEYS}")
    if keys_dtype not in DTYPES:
        raise TypeError(f"keys are {keys_dtype}: convert them to float32")
    if keys_device != device:
        raise ValueError(f"keys are on {keys_device}, x is on {device}: move them to one device")

    for name, described in (("index", index), ("scale", scale), ("shift", shift), ("bias", bias)):
        if described is None:
            continue
        its_shape, its_dtype, its_device = described
        if len(its_shape) != 1 or its_shape[0] != channels:
            raise ValueError(
                f"{name} has shape {tuple(its_shape)}, but x has {channels} channels: expected ({channels},)"
            )
        if its_device != device:
            raise ValueError(f"{name} is on {its_device}, x is on {device}: move them to one device")
        if name == "index":
            if its_dtype not in INTEGERS:
                raise TypeError(f"index is {its_dtype}: expected integers")
        elif its_dtype not in (torch.float32, dtype):
            raise TypeError(f"{name} is {its_dtype}, x is {dtype}: make {name} float32 or {dtype}")

    steps, zeros, spread = geometry(k, stride, padding, dilation)
    if height + 2 * zeros[0] <= spread[0] * (k - 1) or width + 2 * zeros[1] <= spread[1] * (k - 1):
        raise ValueError(
            f"x of {height}x{width} is smaller than a {k}x{k} filter of dilation {spread} with padding {zeros}"
        )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    converts = index[1] != torch.int32 or any(t is not None and t[1] != wide for t in (keys, scale, shift, bias))
    return _Checked(steps, zeros, spread, wide, converts)


def geometry(
    k: int, stride: int | Sequence[int], padding: int | Sequence[int] | str, dilation: int | Sequence[int]
) -> tuple[Pair, Pair, Pair]:
    """Stride, rows and columns of zeros on every side, and dilation, each vertical and horizontal.

    Raises:
        ValueError: Numbers that are none, or words other than "same" (which needs stride 1) and "valid".
    """
    steps, spread = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    if padding == "valid":
        return steps, (0, 0), spread
    if padding == "same":
        if steps != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, not {stride}: give the padding as numbers")
        return steps, (spread[0] * (k - 1) // 2, spread[1] * (k - 1) // 2), spread
    if isinstance(padding, str):
        raise ValueError(f"padding={padding!r}: use numbers, 'same' or 'valid'")
    return steps, _pair("padding", padding, 0), spread


def _pair(name: str, value: int | Sequence[int], least: int) -> Pair:
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(f"{name}={value!r}: expected a whole number of {least} or more, or two of them")
    return pair


def _check_values(keys: Tensor, index: Tensor, scale: Tensor, shift: Tensor) -> None:
    """Refuse an index out of range, and on the CPU a scale and a shift that are not finite."""
    count = keys.shape[0]
    low, high = _range(index)
    if low < 0 or high >= count:
        raise ValueError(f"index is out of range [0, {count}) {_where((index < 0) | (index >= count))}")
    # The sum is not finite where anything in it is not; or where it overflows, so look closer then.
    if scale.is_cpu and not math.isfinite(scale.dot(shift).item()):
        for name, p in (("scale", scale), ("shift", shift)):
            if not p.isfinite().all():
                raise ValueError(f"{name} is not finite {_where(~p.isfinite())}")


_range = Derived(lambda index: (int(index.min()), int(index.max())))


def _where(bad: Tensor) -> str:
    channels = bad.nonzero().flatten().tolist()
    return f"in {len(channels)} of {len(bad)} channels, the first is channel {channels[0]}"


def _dense(x: Tensor) -> Tensor:
    """The same, contiguous or else channels-last."""
    return x if x.is_contiguous() else x.contiguous(memory_format=_layout(x))


def _layout(x: Tensor) -> torch.memory_format:
    """The layout that x has or is nearest to."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    _, channel, row, column = x.stride()
    return torch.channels_last if channel < row and channel < column else torch.contiguous_format


def _is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which only torch's own operators support."""
    return not torch.compiler.is_compiling() and (
        torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None
    )


def _is_plain(x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether nothing but autograd looks at torch's operators, so that this one need not go through the dispatcher.

    That saves 8 microseconds, with gradients 35. Subclasses, torch.compile, export, tracing, the profiler and dispatch
    modes see `torch.ops.mkf.key_conv2d`.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.autograd._profiler_enabled()
        and PLAIN.issuperset(map(type, (x, *tensors)))
        and not x.is_neg()
        and not x.is_meta
    )


def _written_out(
    x: Tensor, keys: Tensor, index: Tensor, scale: Tensor, shift: Tensor, bias: Tensor | None, *options: Any
) -> Tensor:
    """The same as an ordinary convolution, differentiable in whatever way and as often as you like."""
    stride, padding, dilation, *_ = options
    filters = (scale[:, None, None] * keys[index] + shift[:, None, None])[:, None].to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, filters, bias, stride, padding, dilation, groups=x.shape[1])


def _choose(x: Tensor, plan: KeyPlan, stride: Pair, padding: Pair, dilation: Pair, backend: str) -> ModuleType:
    """The module of the implementation for this call."""
    return choose(
        "key_conv2d", x.device, backend, lambda module: module.why_not_call(x, plan, stride, padding, dilation)
    ).load()


class _Call(NamedTuple):
    """What forward and backward of one call have in common; `parameters` are index, scale and shift."""

    implementation: ModuleType
    plan: KeyPlan
    layout: torch.memory_format
    parameters: tuple[Tensor, Tensor, Tensor]


def _forward(
    x: Tensor, keys: Tensor, index: Tensor, scale: Tensor, shift: Tensor, bias: Tensor | None, *options: Any
) -> tuple[Tensor, _Call]:
    stride, padding, dilation, tolerance, backend = options
    index, scale, shift = index.contiguous(), scale.contiguous(), shift.contiguous()
    _check_values(keys, index, scale, shift)
    plan = plan_of(keys.contiguous(), tolerance)
    layout = _layout(x)
    x = x.contiguous(memory_format=layout)
    implementation = _choose(x, plan, stride, padding, dilation, backend)
    size = _output_size(x.shape, keys.shape[-1], stride, padding, dilation)
    if size == x.shape:
        out = torch.empty_like(x, memory_format=layout)
    else:
        out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
    if x.shape[0] > 0:
        bias = None if bias is None else bias.contiguous()
        implementation.key_conv2d(x, plan, index, scale, shift, bias, stride, padding, dilation, out)
    return out, _Call(implementation, plan, layout, (index, scale, shift))


def _gradients(
    call: _Call, dy: Tensor, x: Tensor | None, wanted: Sequence[bool], size: Sequence[int], *options: Any
) -> list[Tensor | None]:
    """Gradients for x, keys, scale, shift and bias; None where none is wanted."""
    implementation, plan, layout, (index, scale, shift) = call
    stride, padding, dilation, *_ = options
    dy = dy.contiguous(memory_format=layout)
    x = None if x is None else x.contiguous(memory_format=layout)
    dx = torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=layout) if wanted[0] else None
    d_scale, d_shift, d_bias = (torch.empty_like(shift) if w else None for w in wanted[2:])
    d_keys = None
    if dy.shape[0] == 0:
        d_keys = torch.zeros_like(plan.keys) if wanted[1] else None
        return [None if t is None else t.zero_() for t in (dx, d_keys, d_scale, d_shift, d_bias)]
    left = wanted
    if wanted[1]:
        # There must be a gradient of every filter; from it scale and shift have theirs too.
        assert x is not None
        dw = weight_gradient(dy, x, plan.keys.shape[-1], stride, padding, dilation)
        member = index == torch.arange(len(plan.keys), device=index.device)[:, None]  # a product with it adds up by key
        d_keys = ((member * scale) @ dw.flatten(1)).view_as(plan.keys)
        if d_scale is not None:
            d_scale.copy_((dw * plan.keys[index]).sum((1, 2)))
        if d_shift is not None:
            d_shift.copy_(dw.sum((1, 2)))
        left = (wanted[0], False, False, False, wanted[4])
    if any(left):
        implementation.key_conv2d_backward(
            dy,
            x,
            plan,
            index,
            scale,
            shift,
            stride,
            padding,
            dilation,
            dx,
            d_scale if left[2] else None,
            d_shift if left[3] else None,
            d_bias,
        )
    return [dx, d_keys, d_scale, d_shift, d_bias]


def _output_size(size: Sequence[int], k: int, stride: Pair, padding: Pair, dilation: Pair) -> tuple[int, ...]:
    n, c, h, w = size
    h = (h + 2 * padding[0] - dilation[0] * (k - 1) - 1) // stride[0] + 1
    w = (w + 2 * padding[1] - dilation[1] * (k - 1) - 1) // stride[1] + 1
    return n, c, h, w


def _op(x: Tensor, *others: Any) -> Tensor:
    return _forward(x, *others)[0]


def _op_fake(x: Tensor, keys: Tensor, *others: Any) -> Tensor:
    *_, stride, padding, dilation, _, _ = others
    size = _output_size(x.shape, keys.shape[-1], stride, padding, dilation)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=_layout(x))


def _op_backward(
    dy: Tensor,
    x: Tensor | None,
    keys: Tensor,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    wanted: Sequence[bool],
    size: Sequence[int],
    *options: Any,
) -> tuple[Tensor, ...]:
    """As `_gradients`, with a tensor of no element for None, since an operator must return tensors."""
    stride, padding, dilation, tolerance, backend = options
    index, scale, shift = index.contiguous(), scale.contiguous(), shift.contiguous()
    _check_values(keys, index, scale, shift)
    plan = plan_of(keys.contiguous(), tolerance)
    layout = _layout(dy if x is None else x)
    x = None if x is None else x.contiguous(memory_format=layout)
    like_x = torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=layout) if x is None else x
    implementation = _choose(like_x, plan, stride, padding, dilation, backend)
    call = _Call(implementation, plan, layout, (index, scale, shift))
    gradients = _gradients(call, dy, x, wanted, size, *options)
    return tuple(dy.new_empty(0) if t is None else t for t in gradients)


def _op_backward_fake(
    dy: Tensor,
    x: Tensor | None,
    keys: Tensor,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    wanted: Sequence[bool],
    size: Sequence[int],
    *options: Any,
) -> tuple[Tensor, ...]:
    layout = _layout(dy if x is None else x)
    dx = torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=layout)
    gradients = (dx, *(t.new_empty(t.shape) for t in (keys, scale, shift, shift)))
    return tuple(t if w else dy.new_empty(0) for t, w in zip(gradients, wanted, strict=True))


_library = torch.library.Library("mkf", "FRAGMENT")
_library.define(
    "key_conv2d(Tensor x, Tensor keys, Tensor index, Tensor scale, Tensor shift, Tensor? bias, SymInt[2] stride,"
    " SymInt[2] padding, SymInt[2] dilation, float? tolerance, str backend) -> Tensor"
)
_library.define(
    "key_conv2d_backward(Tensor dy, Tensor? x, Tensor keys, Tensor index, Tensor scale, Tensor shift, bool[5] wanted,"
    " SymInt[4] size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, float? tolerance, str backend)"
    " -> (Tensor d_x, Tensor d_keys, Tensor d_scale, Tensor d_shift, Tensor d_bias)"
)
_library.impl("key_conv2d", _op, "CompositeExplicitAutograd")
_library.impl("key_conv2d_backward", _op_backward, "CompositeExplicitAutograd")
torch.library.register_fake("mkf::key_conv2d", _op_fake, lib=_library)
torch.library.register_fake("mkf::key_conv2d_backward", _op_backward_fake, lib=_library)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, keys, index, scale, shift, _, *options = inputs
    _, keys_train, _, scale_trains, shift_trains, *_ = ctx.needs_input_grad
    needed = x if keys_train or scale_trains or shift_trains else None
    ctx.save_for_backward(needed, keys, index, scale, shift)
    ctx.size = x.shape
    ctx.options = options


def _wanted(ctx: Any) -> tuple[bool, ...]:
    """Which of x, keys, scale, shift and bias need a gradient."""
    x, keys, _, scale, shift, bias, *_ = ctx.needs_input_grad
    return x, keys, scale, shift, bias


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    wanted = _wanted(ctx)
    gradients = torch.ops.mkf.key_conv2d_backward(dy, *ctx.saved_tensors, wanted, ctx.size, *ctx.options)
    return _by_argument(t if w else None for t, w in zip(gradients, wanted, strict=True))


def _by_argument(gradients: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    dx, d_keys, d_scale, d_shift, d_bias = gradients
    return dx, d_keys, None, d_scale, d_shift, d_bias, None, None, None, None, None


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("torch.ops.mkf.key_conv2d has first derivatives only: use mkf.ops.key_conv2d, uncompiled")


torch.library.register_autograd("mkf::key_conv2d", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("mkf::key_conv2d_backward", _refuse, lib=_library)


class _KeyConv2d(torch.autograd.Function):
    """The same without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        out, ctx.call = _forward(*arguments)
        _setup_context(ctx, arguments, out)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            return _by_argument(_differentiable_gradients(ctx, dy))
        if not _is_plain(dy):
            return _backward(ctx, dy)
        x, *_ = ctx.saved_tensors
        return _by_argument(_gradients(ctx.call, dy, x, _wanted(ctx), ctx.size, *ctx.options))


def _differentiable_gradients(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    """As `_gradients`, to be differentiated again: those of the ordinary convolution."""
    x, keys, index, scale, shift = ctx.saved_tensors
    wanted = _wanted(ctx)
    if x is None:  # then its values do not matter
        x = dy.new_zeros(ctx.size, requires_grad=True)
    out = _written_out(x, keys, index, scale, shift, None, *ctx.options)
    leaves = [t for t, w in zip((x, keys, scale, shift), wanted, strict=False) if w]
    gradients = iter(torch.autograd.grad(out, leaves, dy, create_graph=True) if leaves else ())
    d_bias = dy.sum((0, 2, 3), dtype=shift.dtype) if wanted[4] else None
    return [*(next(gradients) if w else None for w in wanted[:4]), d_bias]
