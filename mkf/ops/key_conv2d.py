"""The key convolution: a depthwise convolution whose filters are scaled and shifted copies of a few shared keys."""

import math
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mkf.kernels.derived import Derived
from mkf.kernels.key_conv2d import KeyPlan
from mkf.kernels.key_conv2d.plan import plan_of
from mkf.kernels.key_conv2d.reference import weight_gradient
from mkf.kernels.registry import choose, passed_over

KERNEL_SIZES = (3, 5, 7, 9, 11)
MAX_KEYS = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

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
        It has first derivatives with respect to x, scale, shift, bias and keys given as a tensor. On the CPU they are
        deterministic and do not depend on the number of threads, where the fast implementations run.

    Raises:
        ValueError: Shapes that do not fit together, an index out of range, a scale or shift or key that is not finite,
            an input smaller than the filter. On a GPU, index and keys are looked at when they are new or were written
            to, scale and shift never: that would wait for the GPU at every step of training.
        TypeError: Dtypes that are no floating-point numbers or do not go together.
        BackendError: The implementation asked for cannot run there, or cannot serve this call.
    """
    x = _input(x)
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    q = _keys(keys, x)
    padding = resolve_padding(padding, q.shape[-1], stride, dilation)
    _check_size(x, q.shape[-1], stride, padding, dilation)
    index, scale, shift, bias = _parameters(x, q, index, scale, shift, bias)
    batch = x if x.ndim == 4 else x[None]
    planned = None if q.requires_grad else tolerance
    arguments = (batch, q, index, scale, shift, bias, stride, padding, dilation, planned, backend or "")
    if not _is_plain(batch, q, index, scale, shift, bias):
        out: Tensor = torch.ops.mkf.key_conv2d(*arguments)
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:6]):
        out = _KeyConv2d.apply(*arguments)
    else:
        out = _run(*arguments)
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
    x = _input(x)
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    q = _keys(keys, x)
    padding = resolve_padding(padding, q.shape[-1], stride, dilation)
    _check_size(x, q.shape[-1], stride, padding, dilation)
    x = _dense(x if x.ndim == 4 else x[None])
    plan = plan_of(q.contiguous(), None if q.requires_grad else tolerance)

    def why_not_call(module: ModuleType) -> str | None:
        reason: str | None = module.why_not_call(x, plan, stride, padding, dilation)
        return reason

    chosen = choose("key_conv2d", x.device, backend, why_not_call)
    reasons = passed_over("key_conv2d", x.device, chosen, why_not_call)
    return "; ".join([f"{chosen.name}: {chosen.description}", *(f"not {name}: {why}" for name, why in reasons.items())])


def resolve_padding(padding: int | Sequence[int] | str, k: int, stride: Pair, dilation: Pair) -> Pair:
    """Rows and columns of zeros on every side, as numbers."""
    if padding == "valid":
        return 0, 0
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, not {stride}: give the padding as numbers")
        return dilation[0] * (k - 1) // 2, dilation[1] * (k - 1) // 2
    if isinstance(padding, str):
        raise ValueError(f"padding={padding!r}: use numbers, 'same' or 'valid'")
    return _pair("padding", padding, 0)


def _pair(name: str, value: int | Sequence[int], least: int) -> Pair:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(f"{name}={value!r}: expected a whole number of {least} or more, or two of them")
    return pair


def _input(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, not {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}: convert it to float32, bfloat16, float16 or float64")
    if x.layout != torch.strided:
        raise TypeError(f"x is not a dense tensor but {x.layout}")
    if x.ndim not in (3, 4) or 0 in x.shape[-3:]:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (N, C, H, W) or (C, H, W); only N may be 0")
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    return x


def _keys(keys: Any, x: Tensor) -> Tensor:
    """(K, k, k) in float32, or in float64 where x is."""
    if not isinstance(keys, Tensor):
        if not hasattr(keys, "filters"):
            raise TypeError(f"keys: expected a KeySet or a tensor, not {type(keys).__name__}")
        keys = _filters(keys, x.device)
    if keys.ndim != 3 or keys.shape[1] != keys.shape[2] or keys.shape[2] not in KERNEL_SIZES:
        raise ValueError(f"keys have shape {tuple(keys.shape)}: expected (K, k, k) with k one of {KERNEL_SIZES}")
    if not 1 <= keys.shape[0] <= MAX_KEYS:
        raise ValueError(f"there are {keys.shape[0]} keys: expected 1 to {MAX_KEYS}")
    if keys.dtype not in DTYPES:
        raise TypeError(f"keys are {keys.dtype}: convert them to float32")
    if keys.device != x.device:
        raise ValueError(f"keys are on {keys.device}, x is on {x.device}: move them to one device")
    q: Tensor = keys.to(_wide(x))
    return q


@lru_cache(64)
def _filters(keys: Any, device: torch.device) -> Tensor:
    filters: Tensor = keys.filters
    return filters.to(device)


def _parameters(
    x: Tensor, keys: Tensor, index: Tensor, scale: Tensor, shift: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Index as int32, the others as float32, or float64 where x is."""
    channels = x.shape[-3]
    for name, p in (("index", index), ("scale", scale), ("shift", shift), ("bias", bias)):
        if p is None and name == "bias":
            continue
        if not isinstance(p, Tensor):
            raise TypeError(f"{name}: expected a tensor, not {type(p).__name__}")
        if p.ndim != 1 or p.shape[0] != channels:
            raise ValueError(
                f"{name} has shape {tuple(p.shape)}, but x has {channels} channels: expected ({channels},)"
            )
        if p.device != x.device:
            raise ValueError(f"{name} is on {p.device}, x is on {x.device}: move them to one device")
        if p.dtype not in (torch.float32, x.dtype) and name != "index":
            raise TypeError(f"{name} is {p.dtype}, x is {x.dtype}: make {name} float32 or {x.dtype}")
    if index.dtype != torch.int32:
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise TypeError(f"index is {index.dtype}: expected integers")
        index = index.clamp(-1, keys.shape[0]).to(torch.int32)  # what is out of range stays so
    wide = _wide(x)
    return index, scale.to(wide), shift.to(wide), None if bias is None else bias.to(wide)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_size(x: Tensor, k: int, stride: Pair, padding: Pair, dilation: Pair) -> None:
    height, width = x.shape[-2:]
    if height + 2 * padding[0] <= dilation[0] * (k - 1) or width + 2 * padding[1] <= dilation[1] * (k - 1):
        raise ValueError(
            f"x of {height}x{width} is smaller than a {k}x{k} filter of dilation {dilation} with padding {padding}"
        )


def _check_values(keys: Tensor, index: Tensor, scale: Tensor, shift: Tensor) -> None:
    """Refuse an index out of range, and on the CPU a scale and a shift that are not finite."""
    count = keys.shape[0]
    low, high = _range(index)
    if low < 0 or high >= count:
        raise ValueError(f"index is out of range [0, {count}) {_where((index < 0) | (index >= count))}")
    # The sum is not finite where anything in it is not; or where it overflows, so look closer then.
    if scale.device.type == "cpu" and not math.isfinite(scale.dot(shift).item()):
        for name, p in (("scale", scale), ("shift", shift)):
            if not p.isfinite().all():
                raise ValueError(f"{name} is not finite {_where(~p.isfinite())}")


_range = Derived(lambda index: (int(index.min()), int(index.max())))


def _where(bad: Tensor) -> str:
    channels = bad.nonzero().flatten().tolist()
    return f"in {len(channels)} of {len(bad)} channels, the first is channel {channels[0]}"


def _dense(x: Tensor) -> Tensor:
    """The same, contiguous or else channels-last."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous(memory_format=_layout(x))


def _layout(x: Tensor) -> torch.memory_format:
    """The layout that x has or is nearest to."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    _, channel, row, column = x.stride()
    return torch.channels_last if channel < row and channel < column else torch.contiguous_format


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd looks at torch's operators, so that this one need not go through the dispatcher.

    That saves a third of the time of a small layer: 10 microseconds, 35 with gradients. Subclasses, torch.compile,
    export, tracing, the profiler, dispatch modes, torch.func and forward-mode gradients see `torch.ops.mkf.key_conv2d`.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and torch.autograd.forward_ad._current_level < 0
        and not torch.autograd._profiler_enabled()
        and all(t is None or (type(t) in (Tensor, Parameter) and not t.is_neg()) for t in tensors)
    )


def _choose(x: Tensor, plan: KeyPlan, stride: Pair, padding: Pair, dilation: Pair, backend: str) -> Any:
    """The module of the implementation for this call."""
    return choose(
        "key_conv2d", x.device, backend, lambda module: module.why_not_call(x, plan, stride, padding, dilation)
    ).load()


def _run(
    x: Tensor, keys: Tensor, index: Tensor, scale: Tensor, shift: Tensor, bias: Tensor | None, *options: Any
) -> Tensor:
    stride, padding, dilation, tolerance, backend = options
    _check_values(keys, index, scale, shift)
    plan = plan_of(keys.contiguous(), tolerance)
    x = _dense(x)
    implementation = _choose(x, plan, stride, padding, dilation, backend)
    out = _empty(x, keys, index, scale, shift, bias, *options)
    if x.shape[0] > 0:
        index, scale, shift = index.contiguous(), scale.contiguous(), shift.contiguous()
        bias = None if bias is None else bias.contiguous()
        implementation.key_conv2d(x, plan, index, scale, shift, bias, stride, padding, dilation, out)
    return out


def _empty(x: Tensor, keys: Tensor, *others: Any) -> Tensor:
    """The output, not yet computed."""
    _, _, _, _, stride, padding, dilation, *_ = others
    spatial = [
        (length + 2 * p - d * (keys.shape[-1] - 1) - 1) // s + 1
        for length, s, p, d in zip(x.shape[2:], stride, padding, dilation, strict=True)
    ]
    return _empty_like(x, (*x.shape[:2], *spatial))


def _run_backward(
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
    """Gradients for x, keys, scale, shift and bias; one of no element where none is wanted."""
    stride, padding, dilation, tolerance, backend = options
    _check_values(keys, index, scale, shift)
    x = None if x is None else _dense(x)
    dy = _dense(dy) if x is None else dy.contiguous(memory_format=_layout(x))
    outputs = _empty_gradients(dy, x, keys, index, scale, shift, wanted, size, *options)
    if dy.shape[0] == 0:
        return tuple(t.zero_() for t in outputs)
    dx, d_keys, d_scale, d_shift, d_bias = (t if w else None for t, w in zip(outputs, wanted, strict=True))
    plan = plan_of(keys.contiguous(), tolerance)
    index, scale, shift = index.contiguous(), scale.contiguous(), shift.contiguous()
    if d_keys is not None and x is not None:
        # There must be a gradient of every filter; from it scale and shift have theirs too.
        dw = weight_gradient(dy, x, keys.shape[-1], stride, padding, dilation)
        member = index == torch.arange(keys.shape[0], device=index.device)[:, None]  # a product with it adds up by key
        d_keys.copy_(((member * scale) @ dw.flatten(1)).view_as(d_keys))
        if d_scale is not None:
            d_scale.copy_((dw * keys[index]).sum((1, 2)))
        if d_shift is not None:
            d_shift.copy_(dw.sum((1, 2)))
        d_scale = d_shift = None
    if not (dx is None and d_scale is None and d_shift is None and d_bias is None):
        shaped = x if x is not None else dx if dx is not None else _empty_like(dy, size)
        implementation = _choose(shaped, plan, stride, padding, dilation, backend)
        implementation.key_conv2d_backward(
            dy, x, plan, index, scale, shift, stride, padding, dilation, dx, d_scale, d_shift, d_bias
        )
    return outputs


def _empty_gradients(
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
    """What `_run_backward` returns, not yet computed."""
    parameters = (keys, scale, shift, shift)
    return (
        _empty_like(dy if x is None else x, size) if wanted[0] else dy.new_empty(0),
        *(torch.empty_like(t) if w else t.new_empty(0) for t, w in zip(parameters, wanted[1:], strict=True)),
    )


def _empty_like(x: Tensor, size: Sequence[int]) -> Tensor:
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=_layout(x))


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
_library.impl("key_conv2d", _run, "CompositeExplicitAutograd")
_library.impl("key_conv2d_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("mkf::key_conv2d", _empty, lib=_library)
torch.library.register_fake("mkf::key_conv2d_backward", _empty_gradients, lib=_library)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, keys, index, scale, shift, _, *options = inputs
    _, keys_train, _, scale_trains, shift_trains, *_ = ctx.needs_input_grad
    needed = x if keys_train or scale_trains or shift_trains else None
    ctx.save_for_backward(needed, keys, index, scale, shift)
    ctx.size = x.shape
    ctx.options = options


def _backward(ctx: Any, dy: Tensor, run: Any = torch.ops.mkf.key_conv2d_backward) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad
    wanted = [needed[i] for i in (0, 1, 3, 4, 5)]
    gradients = run(dy, *ctx.saved_tensors, wanted, ctx.size, *ctx.options)
    dx, *parameters = (t if w else None for t, w in zip(gradients, wanted, strict=True))
    return dx, parameters[0], None, *parameters[1:], None, None, None, None, None


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "key_conv2d has first derivatives only: for second ones take an ordinary convolution with the filters written "
        "out, as KeyConv2d.to_conv2d() does"
    )


torch.library.register_autograd("mkf::key_conv2d", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("mkf::key_conv2d_backward", _refuse, lib=_library)


class _KeyConv2d(torch.autograd.Function):
    """The same without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        _setup_context(ctx, arguments, arguments[0])
        return _run(*arguments)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled() or not _is_plain(dy):  # enabled where gradients are to be differentiated again
            return _backward(ctx, dy)
        return _backward(ctx, dy, _run_backward)
