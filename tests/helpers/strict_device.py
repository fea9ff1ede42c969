"""An imitation of one CUDA device on the CPU.

Inside `strict_device`, ``torch.cuda.is_available()`` is True, and tensors on ``cuda:0`` report that device while their values
are computed on the CPU. The imitation raises where CUDA raises: for tensors of two devices in one operation, for a CPU
generator with a tensor on the device, and for an allocation beyond the card's memory. It counts by phase what costs time on
CUDA: operations that launch kernels, waits of the host for the device, and copies to the device. ``torch.autocast("cuda")``
follows CUDA's lists of operations.

    with strict_device(Card.t4()) as device:
        model.to("cuda:0")
        with device.phase("rollout"):
            ...
        print(device.counts["rollout"].waits)

Tensors are wrappers of CPU tensors on torch's PrivateUse1 backend, because autograd has no device guard for CUDA in builds for
the CPU. One process sees one device, and all work is in its main thread. The imitation says nothing about speed, rounding or
asynchrony.
"""

from __future__ import annotations

import contextlib
import os
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

CUDA = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_BACKEND = "imitation"  # name of the PrivateUse1 backend
_OUTSIDE = "outside"  # the phase outside all phases
_LARGE_ON_CPU = 4096  # elements


class DeviceMixError(RuntimeError):
    """Tensors of the device and of the CPU in one operation, or a CPU generator for a tensor on the device."""


@dataclass
class Card:
    """Properties of the imitated card. A test may change them inside the context.

    Args:
        name: As in ``torch.cuda.get_device_name``.
        total_memory: Bytes. Allocations beyond it raise ``torch.OutOfMemoryError``.
        used_elsewhere: Bytes that other processes use.
        capability: Compute capability. Below (8, 0) the card has no bfloat16 units.
    """

    name: str = "Imitated GPU"
    total_memory: int = 24 * 2**30
    used_elsewhere: int = 0
    capability: tuple[int, int] = (8, 9)

    @classmethod
    def t4(cls) -> Card:
        """Return a card without bfloat16 units."""
        return cls("Tesla T4", 15 * 2**30, 0, (7, 5))


@dataclass
class Counts:
    """Counts of one phase. Keys of the counters name the operation and the line of the package that called it.

    Args:
        kernels: Operations on the device that launch at least one kernel, by operation. A fused operation counts once.
        waits: Reads and other calls for which the host waits until the device has finished.
        uploads: Copies from the CPU to the device for which the host waits.
        large: Results on the device with more elements than the limit of `strict_device`.
        on_cpu: Operations on CPU tensors of more than 4096 elements.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    large: Counter[str] = field(default_factory=Counter)
    on_cpu: Counter[str] = field(default_factory=Counter)

    @property
    def synchronizations(self) -> Counter[str]:
        """Waits and uploads: all calls for which the host waits."""
        return self.waits + self.uploads


class _Allocation:
    """Bytes of one storage on the device, released with the last tensor that uses it."""

    def __init__(self, device: StrictDevice, size: int) -> None:
        self.device, self.size = device, 0
        device.reserve(size)
        self.size = size

    def __del__(self) -> None:
        self.device.allocated -= self.size


class DeviceTensor(Tensor):
    """A tensor on the imitated device. Its values are those of the CPU tensor ``raw``."""

    raw: Tensor
    allocation: _Allocation | None
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> DeviceTensor:
        with torch.inference_mode(False):  # views of a wrapper need a version counter
            made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
                layout=raw.layout, device=torch.device(_BACKEND, 0), requires_grad=False,
            )  # fmt: skip
        made.raw = raw
        made.allocation = StrictDevice.current().allocation_of(raw)
        return made

    @property
    def data(self) -> DeviceTensor:  # type: ignore[override]
        return DeviceTensor(self.raw)

    @data.setter
    def data(self, value: DeviceTensor) -> None:
        torch._C.TensorBase.data.__set__(self, value)  # type: ignore[attr-defined]
        self.raw, self.allocation = value.raw, value.allocation

    def get_device(self) -> int:
        return 0

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        # Torch compares the target with the device below Python, and would copy.
        wanted = {name: value for name, value in kwargs.items() if name != "copy"}
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **wanted)  # type: ignore[attr-defined]
        if device is not None and device.type == "cuda" and dtype in (None, self.dtype) and not kwargs.get("copy"):
            return self
        return super().to(*args, **kwargs)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["raw"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> DeviceTensor:
        return DeviceTensor(inner["raw"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return StrictDevice.current().run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.raw!r}, device='cuda:0')"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.raw.detach().__reduce_ex__(protocol)  # a checkpoint of it is loaded on the CPU first

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made: Tensor = DeviceTensor(self.raw.detach().clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, self.requires_grad)
        memo[id(self)] = made
        return made


# Parameter classes of other libraries that are also on the device, by their original class.
_parameter_classes: dict[type, type] = {}
_make_subclass = torch.Tensor._make_subclass


def _make_device_subclass(cls: type, data: Tensor, requires_grad: bool = False, **kwargs: Any) -> Tensor:
    """Replace ``torch.Tensor._make_subclass``, by which libraries such as bitsandbytes make their parameters."""
    if not isinstance(data, DeviceTensor):
        return _make_subclass(cls, data, requires_grad, **kwargs)
    if issubclass(DeviceTensor, cls):
        return DeviceTensor(data.raw).requires_grad_(requires_grad)
    if not issubclass(cls, DeviceTensor):
        cls = _parameter_classes.setdefault(cls, type(cls)(cls.__name__, (cls, DeviceTensor), {}))
    return DeviceTensor.__new__(cls, data.raw).requires_grad_(requires_grad)


# Operations for which the host waits, because the shape or the value of the result is read.
_WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "histc",
}  # fmt: skip
_INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}
_RANDOM = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "multinomial", "bernoulli",
    "bernoulli_", "native_dropout", "normal_", "uniform_", "exponential_", "random_", "cauchy_", "geometric_", "normal",
    "log_normal_",
}  # fmt: skip
# Operations without a kernel, besides views.
_NO_KERNEL = {
    "_unsafe_view", "_reshape_alias", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
    "is_same_size", "set_", "resize_", "is_pinned", "_pin_memory", "device", "_assert_tensor_metadata",
}  # fmt: skip


class StrictDevice(TorchDispatchMode):
    """The imitated device. See `strict_device`.

    Attributes:
        card: Properties of the card.
        counts: Counts by phase. Work outside all phases is in the phase ``outside``.
        mixes: Operations with tensors of both devices, if they do not raise.
        cpu_random: Operations that drew random numbers on the CPU, by phase.
        allocated: Bytes of all tensors on the device.
        peak: Largest value of ``allocated`` since the last ``torch.cuda.reset_peak_memory_stats``.
    """

    _current: ClassVar[StrictDevice | None] = None

    def __init__(self, card: Card, large: int | Callable[[Tensor], bool] | None, strict: bool) -> None:
        super().__init__()
        self.card, self.large_limit, self.strict = card, large, strict
        self.where = _OUTSIDE
        self.counts: dict[str, Counts] = defaultdict(Counts)
        self.mixes: Counter[str] = Counter()
        self.cpu_random: dict[str, Counter[str]] = defaultdict(Counter)
        self.allocated = self.peak = 0
        self.generator_state = torch.Generator().manual_seed(0).get_state()
        self._allocations: weakref.WeakValueDictionary[int, _Allocation] = weakref.WeakValueDictionary()

    @classmethod
    def current(cls) -> StrictDevice:
        """Return the device of the innermost `strict_device`."""
        if cls._current is None:
            raise RuntimeError("a tensor of the imitated device is used outside strict_device()")
        return cls._current

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Counts]:
        """Count under a name inside the context, and return the counts of that name."""
        before, self.where = self.where, name
        try:
            yield self.counts[name]
        finally:
            self.where = before

    # -- memory --------------------------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Bytes that can still be allocated."""
        return self.card.total_memory - self.card.used_elsewhere - self.allocated

    def reserve(self, size: int) -> None:
        """Count an allocation.

        Raises:
            torch.OutOfMemoryError: The card has less free memory.
        """
        if size > self.free:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU 0 has a total capacity of "
                f"{self.card.total_memory / 2**30:.2f} GiB of which {self.free / 2**20:.2f} MiB is free."
            )
        self.allocated += size
        self.peak = max(self.peak, self.allocated)

    def allocation_of(self, raw: Tensor) -> _Allocation | None:
        """Return the allocation of a tensor's storage, and count it if it is new."""
        if raw.layout != torch.strided or raw.device.type != "cpu":
            return None
        storage = raw.untyped_storage()
        if not storage.nbytes():
            return None
        found = self._allocations.get(storage.data_ptr())
        if found is None or found.size != storage.nbytes():
            found = _Allocation(self, storage.nbytes())
            self._allocations[storage.data_ptr()] = found
        return found

    # -- operations ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation on the CPU, after the checks that CUDA makes."""
        name = func._schema.name.rpartition("::")[2]
        leaves = _leaves((args, kwargs), [])
        ours = [leaf for leaf in leaves if isinstance(leaf, DeviceTensor)]
        plain = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, DeviceTensor)]
        wanted = kwargs.get("device")
        wanted = None if wanted is None else torch.device(wanted).type
        on_device = wanted in ("cuda", _BACKEND) or (bool(ours) and wanted is None)
        if name in ("_to_copy", "copy_"):
            on_device = self._count_copy(name, args, kwargs, on_device)
        else:
            self._check_devices(func, name, args, kwargs, ours, plain, on_device)
            if on_device:
                self._count(func, name, args, kwargs)
        draws = name in _RANDOM and not (name == "native_dropout" and not args[2])
        if draws and not on_device and wanted != "meta" and not any(tensor.is_meta for tensor in plain):
            self.cpu_random[self.where][f"{name} @ {caller()}"] += 1
        most = max((tensor.numel() for tensor in plain), default=0)
        if most > _LARGE_ON_CPU and not on_device and not ours and name not in _NO_KERNEL and not func.is_view:
            self.counts[self.where].on_cpu[f"{name} of {most} @ {caller()}"] += 1
        if name in ("is_pinned", "_pin_memory"):
            return False if name == "is_pinned" else args[0]
        raw_args, raw_kwargs = _map(_to_cpu, args), _map(_to_cpu, kwargs)
        if isinstance(raw_kwargs.get("device"), str):
            raw_kwargs["device"] = _CPU
        raw_kwargs.pop("pin_memory", None)
        with self.own_generator() if draws and on_device else contextlib.nullcontext():
            out = func(*raw_args, **raw_kwargs)
        return self._wrapped(func, name, out, ours) if on_device else out

    def _wrapped(self, func: Any, name: str, out: Any, ours: list[DeviceTensor]) -> Any:
        wrappers = {id(tensor.raw): tensor for tensor in ours}

        def wrap(value: Any) -> Any:
            if not isinstance(value, Tensor) or isinstance(value, DeviceTensor):
                return value
            return wrappers[id(value)] if id(value) in wrappers else DeviceTensor(value)

        found = _map(wrap, out)
        self.look_at_sizes(name, found, func.is_view)
        return found

    def _count_copy(self, name: str, args: Any, kwargs: dict[str, Any], on_device: bool) -> bool:
        """Count a copy between devices or a cast, and return True if the result is on the device."""
        if name == "copy_":
            target, source = args[0], args[1]
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            on_device = isinstance(target, DeviceTensor)
        else:
            source, blocking = args[0], not kwargs.get("non_blocking", False)
        from_device = isinstance(source, DeviceTensor)
        if not source.numel():  # nothing is copied
            return on_device
        counts = self.counts[self.where]
        if from_device and not on_device:
            counts.waits[f"copy to the CPU @ {caller()}"] += 1
        elif on_device and not from_device:
            if blocking:
                counts.uploads[f"copy to the device @ {caller()}"] += 1
        elif on_device:
            counts.kernels[name] += 1
        return on_device

    def _check_devices(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], ours: list[DeviceTensor], plain: list[Tensor],
        on_device: bool,
    ) -> None:  # fmt: skip
        mixed = [tensor for tensor in plain if tensor.dim() > 0] if ours else []  # a scalar may be on the CPU
        if mixed and name in _INDEXING and isinstance(args[0], DeviceTensor):
            values = args[2] if len(args) > 2 else None
            mixed = [values] if isinstance(values, Tensor) and not isinstance(values, DeviceTensor) and values.dim() else []
            if not mixed:  # CUDA copies an index on the CPU
                self.counts[self.where].uploads[f"{name} by an index on the CPU @ {caller()}"] += 1
        if mixed:
            place = f"{func}: cuda:0 and cpu {[tuple(tensor.shape) for tensor in mixed]} @ {caller()}"
            self.mixes[place] += 1
            if self.strict:
                raise DeviceMixError(f"Expected all tensors to be on the same device: {place}")
        generator = kwargs.get("generator")
        if on_device and generator is not None and generator.device.type == "cpu":
            raise DeviceMixError(f"Expected a 'cuda' device type for generator but found 'cpu': {func} @ {caller()}")

    def _count(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        counts = self.counts[self.where]
        waits = name in _WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None)
        if name in _INDEXING:
            masks = [i for i in _leaves(args[1], []) if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)]
            fills = len(args) > 2 and isinstance(args[2], Tensor) and args[2].dim() == 0  # a number: masked_fill_
            waits = bool(masks) and not fills
        if waits:
            counts.waits[f"{name} @ {caller()}"] += 1
        if name not in _NO_KERNEL and name != "_local_scalar_dense" and not func.is_view:
            counts.kernels[name] += 1

    def look_at_sizes(self, name: str, found: Any, is_view: bool = False) -> None:
        """Count results that are larger than the limit."""
        if self.large_limit is None or is_view or name == "_unsafe_view":
            return
        for tensor in _leaves(found, []):
            if isinstance(tensor, DeviceTensor) and self._is_large(tensor):
                place = f"{name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} @ {caller()}"
                self.counts[self.where].large[place] += 1

    def _is_large(self, tensor: Tensor) -> bool:
        limit = self.large_limit
        return limit is not None and (tensor.numel() > limit if isinstance(limit, int) else limit(tensor))

    @contextlib.contextmanager
    def own_generator(self) -> Iterator[None]:
        """Draw random numbers from the device's generator inside the context."""
        before = torch.get_rng_state()
        torch.set_rng_state(self.generator_state)
        try:
            yield
        finally:
            self.generator_state = torch.get_rng_state()
            torch.set_rng_state(before)


def _leaves(value: Any, found: list[Any]) -> list[Any]:
    """Append the leaves of nested lists, tuples and dictionaries to a list, and return it."""
    if isinstance(value, (list, tuple)):
        for part in value:
            _leaves(part, found)
    elif isinstance(value, dict):
        for part in value.values():
            _leaves(part, found)
    else:
        found.append(value)
    return found


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to the leaves of nested lists, tuples and dictionaries. Faster than torch's trees."""
    if isinstance(value, (list, tuple)):
        made = [_map(function, part) for part in value]
        return made if isinstance(value, list) else tuple(made)
    if isinstance(value, dict):
        return {name: _map(function, part) for name, part in value.items()}
    return function(value)


def _to_cpu(leaf: Any) -> Any:
    if isinstance(leaf, DeviceTensor):
        return leaf.raw
    return _CPU if isinstance(leaf, torch.device) and leaf.type in ("cuda", _BACKEND) else leaf


def caller() -> str:
    """Return the package's line nearest to an operation, and the nearest line outside torch if it is another one."""
    frame: Any = sys._getframe(1)
    near = own = ""
    while frame is not None and not (near and own):
        path = frame.f_code.co_filename
        if path != __file__:
            place = f"{frame.f_lineno} {frame.f_code.co_name}"
            if not near and "/torch/" not in path and "contextlib" not in path:
                near = f"{path.rpartition('site-packages/')[2]}:{place}"
            if not own and "/opsd_lightning/" in path:
                own = f"{path.rpartition('/opsd_lightning/')[2]}:{place}"
        frame = frame.f_back
    return own if own and near.endswith(own) else f"{own or '-'} <- {near or '-'}"


# -- fused operations --------------------------------------------------------------------------------------------------


class _Fused(torch.autograd.Function):
    """An operation that CUDA runs as one kernel, and torch would decompose on this backend."""

    @staticmethod
    def forward(ctx: Any, operation: Callable[..., Any], name: str, static: dict[str, Any], *args: Any) -> Tensor:
        device = StrictDevice.current()
        if device.strict and any(
            isinstance(arg, Tensor) and not isinstance(arg, DeviceTensor) and arg.dim() for arg in args
        ):
            raise DeviceMixError(f"Expected all tensors to be on the same device: {name} @ {caller()}")
        device.counts[device.where].kernels[name] += 1
        raw = [arg.raw.detach() if isinstance(arg, DeviceTensor) else arg for arg in args]
        needs = ctx.needs_input_grad[3:]
        for tensor, need in zip(raw, needs, strict=True):
            if need:
                tensor.requires_grad_()
        draws = static.get("dropout_p", 0.0) > 0
        generator = device.own_generator() if draws else contextlib.nullcontext()
        with torch.set_grad_enabled(any(needs)), generator, _disable_current_modes():
            out = operation(*raw, **static)
        ctx.name, ctx.raw, ctx.needs, ctx.out = name, raw, needs, out
        found = DeviceTensor(out.detach())
        device.look_at_sizes(name, found)
        return found

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        device = StrictDevice.current()
        device.counts[device.where].kernels[f"{ctx.name}_backward"] += 1
        inputs = [tensor for tensor, need in zip(ctx.raw, ctx.needs, strict=True) if need]
        with _disable_current_modes():
            found = iter(torch.autograd.grad(ctx.out, inputs, grad_outputs[0].raw, retain_graph=True))
        gradients = [DeviceTensor(next(found)) if need else None for need in ctx.needs]
        return None, None, None, *gradients


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    name = "scaled_dot_product_attention"
    return _Fused.apply(torch.nn.functional.scaled_dot_product_attention, name, options, query, key, value, attn_mask)


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    def operation(raw: Tensor, raw_weight: Tensor | None) -> Tensor:
        return torch.nn.functional.rms_norm(raw, list(normalized_shape), raw_weight, eps)

    return _Fused.apply(operation, "_fused_rms_norm", {}, input, weight)


# -- autocast ----------------------------------------------------------------------------------------------------------

# CUDA's autocast (aten/src/ATen/autocast_mode.h): operations in the lower precision, operations with a float32 result,
# operations in the widest dtype of their inputs, and operations without support. All other registered ones run in float32.
LOWER_PRECISION = {
    "_convolution", "_convolution.deprecated", "_thnn_fused_gru_cell", "_thnn_fused_lstm_cell", "addbmm", "addmm", "addmv",
    "addr", "baddbmm", "bmm", "chain_matmul", "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d",
    "conv_transpose2d.input", "conv_transpose3d.input", "convolution", "cudnn_convolution", "cudnn_convolution_transpose",
    "einsum", "gru_cell", "linalg_multi_dot", "linalg_vecdot", "linear", "lstm_cell", "matmul", "mm", "mv", "prelu",
    "rnn_relu_cell", "rnn_tanh_cell", "scaled_dot_product_attention", "_scaled_dot_product_flash_attention",
}  # fmt: skip
FLOAT32_RESULT = {
    "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm",
    "linalg_matrix_norm", "linalg_matrix_norm.str_ord", "sum", "sum.dim_IntList",
}  # fmt: skip
WIDEST = {
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "grid_sampler", "index_put", "scatter_add", "tensordot", "vdot",
}  # fmt: skip
UNSUPPORTED = {"binary_cross_entropy"}


def autocast_operations() -> set[str]:
    """Return the operations that this version of torch registers for CUDA's autocast."""
    return {name.removeprefix("aten::") for name in torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA")}


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _autocast(name: str, excluded: Any) -> Callable[..., Any]:
    """Return the autocast kernel of an operation."""
    operation = _overload(name)
    names = [argument.name for argument in operation._schema.arguments]

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            tensors = [
                leaf for leaf in _leaves((args, kwargs), [])
                if isinstance(leaf, DeviceTensor) and leaf.is_floating_point() and leaf.dtype != torch.float64
            ]  # fmt: skip
            if name in FLOAT32_RESULT:
                if not tensors:
                    return operation(*args, **kwargs)
                bound = dict(zip(names, args, strict=False)) | kwargs
                return operation(**bound | {"dtype": torch.float32 if bound.get("dtype") is None else bound["dtype"]})
            if name in LOWER_PRECISION:
                target = torch.get_autocast_dtype(_BACKEND)
            elif name in WIDEST:
                wide = any(tensor.dtype == torch.float32 for tensor in tensors)
                target = torch.float32 if wide else torch.get_autocast_dtype(_BACKEND)
            else:
                target = torch.float32

            chosen = {id(tensor) for tensor in tensors if tensor.dtype != target}

            def cast(value: Any) -> Any:
                return value.to(target) if id(value) in chosen else value

            return operation(*_map(cast, args), **_map(cast, kwargs))

    return run


_libraries: list[Any] = []


def _register_backend() -> None:
    """Register the backend, its fused operations and its autocast. Once in a process."""
    if _libraries:
        return
    # Autograd starts a thread for each device at the first backward pass of a process, which could not be forked afterwards.
    # Before the backend is registered there is no device. Backward passes of the imitation need no such thread.
    torch.ones((), requires_grad=True).backward()
    module = SimpleNamespace(
        __name__=_BACKEND,
        is_initialized=lambda: True, is_available=lambda: StrictDevice._current is not None, current_device=lambda: 0, device_count=lambda: 1,
        _is_in_bad_fork=lambda: False, manual_seed_all=lambda seed: None, _lazy_init=lambda: None,
        get_rng_state=lambda device=None: torch.cuda.get_rng_state(), synchronize=lambda device=None: None,
        set_rng_state=lambda state, device=None: torch.cuda.set_rng_state(state), empty_cache=lambda: None,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16, torch.float32],
    )  # fmt: skip
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(_BACKEND, backend_module=module)
    aten, fallback = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    _libraries.extend([aten, fallback])
    fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    excluded = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    for name in sorted(autocast_operations() - UNSUPPORTED):
        with contextlib.suppress(AttributeError):  # registered in C++, without a Python operation
            aten.impl(_overload(name), _autocast(name, excluded), "AutocastPrivateUse1")
    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        aten.impl("scaled_dot_product_attention", _attention, key)
        aten.impl("rms_norm", _rms_norm, key)


# -- torch.cuda --------------------------------------------------------------------------------------------------------


class _Inert:
    """A stream or an event, whose methods do nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = CUDA

    def __getattr__(self, name: str) -> Callable[..., _Inert]:
        if name == "synchronize":
            StrictDevice.current().counts[StrictDevice.current().where].waits[f"synchronize @ {caller()}"] += 1
        return lambda *args, **kwargs: self

    def __enter__(self) -> _Inert:
        return self

    def __exit__(self, *args: Any) -> None:
        return None


def _in_teardown() -> bool:
    """Return True if Lightning tears down a run after an error."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_call_and_handle_interrupt":
            return isinstance(frame.f_locals.get("exception"), BaseException)
        frame = frame.f_back
    return False


def _replacements(device: StrictDevice) -> dict[str, Any]:
    """Return the functions of torch that differ with a CUDA device."""
    card = device.card

    def properties(index: Any = None) -> SimpleNamespace:
        return SimpleNamespace(
            name=card.name, total_memory=card.total_memory, major=card.capability[0], minor=card.capability[1],
            multi_processor_count=100, uuid="0", warp_size=32, gcnArchName="",
        )  # fmt: skip

    def bf16_supported(including_emulation: bool = True) -> bool:
        return including_emulation or card.capability >= (8, 0)

    def synchronize(index: Any = None) -> None:
        device.counts[device.where].waits[f"synchronize @ {caller()}"] += 1

    def reset_peak(index: Any = None) -> None:
        device.peak = device.allocated

    def memory_stats(index: Any = None) -> dict[str, int]:
        found = {"allocated_bytes.all": device.allocated, "reserved_bytes.all": device.allocated}
        return {f"{name}.current": size for name, size in found.items()} | {f"{name}.peak": device.peak for name in found}

    def seed(value: int) -> None:
        device.generator_state = torch.Generator().manual_seed(int(value)).get_state()

    def get_state(index: Any = None) -> Tensor:
        return device.generator_state.clone()

    def set_state(state: Tensor, index: Any = None) -> None:
        device.generator_state = state.clone()

    enable, set_dtype, swap = torch.set_autocast_enabled, torch.set_autocast_dtype, torch.utils.swap_tensors

    def set_autocast_enabled(kind: Any, enabled: bool | None = None) -> None:
        if enabled is None:
            enable(kind)
            return
        enable(kind, enabled)
        if kind == "cuda":  # torch.autocast("cuda") also switches the backend below
            enable(_BACKEND, enabled)

    def set_autocast_dtype(kind: str, dtype: torch.dtype) -> None:
        set_dtype(kind, dtype)
        if kind == "cuda":
            set_dtype(_BACKEND, dtype)

    def with_index(function: Callable[..., Any]) -> Callable[..., Any]:
        """Replace "cuda" by "cuda:0" in the arguments. Torch would ask CUDA's device guard for the current device."""

        def convert(value: Any) -> Any:
            named = isinstance(value, torch.device) and value.type == "cuda"
            return CUDA if named or (isinstance(value, str) and value == "cuda") else value

        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*map(convert, args), **{name: convert(value) for name, value in kwargs.items()})

        return call

    def cuda(tensor: Tensor, index: Any = None, non_blocking: bool = False, **kwargs: Any) -> Tensor:
        return tensor.to(CUDA, non_blocking=non_blocking, **kwargs)

    make_parameter = torch.nn.Parameter.__new__

    def new_parameter(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
        if cls is torch.nn.Parameter and isinstance(data, torch.nn.Parameter) and type(data) is not cls:
            return data.requires_grad_(requires_grad)  # a parameter class of another library that moves with its module
        return make_parameter(cls, data, requires_grad)

    def swap_tensors(one: Tensor, other: Tensor) -> None:
        same = isinstance(one, DeviceTensor) and isinstance(other, DeviceTensor) and one.dtype == other.dtype
        if same and one.data_ptr() == other.data_ptr():  # module.to(device) of a module on the device: nothing to do
            return
        try:
            swap(one, other)
        except RuntimeError:
            # The graph of a failed pass refers to the parameter. The module is torn down, and the first error counts.
            if not _in_teardown():
                raise

    return {
        "torch.Tensor._make_subclass": staticmethod(_make_device_subclass),
        "torch.tensor": with_index(torch.tensor),
        "torch.as_tensor": with_index(torch.as_tensor),
        "torch.Tensor.to": with_index(torch.Tensor.to),
        "torch.Tensor.cuda": cuda,
        "torch.nn.Parameter.__new__": staticmethod(new_parameter),
        "torch.utils.swap_tensors": swap_tensors,
        "torch.set_autocast_enabled": set_autocast_enabled,
        "torch.set_autocast_dtype": set_autocast_dtype,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.is_initialized": lambda: True,
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.init": lambda: None,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.set_device": lambda index: None,
        "torch.cuda.get_device_name": lambda index=None: card.name,
        "torch.cuda.get_device_properties": properties,
        "torch.cuda.get_device_capability": lambda index=None: card.capability,
        "torch.cuda.is_bf16_supported": bf16_supported,
        "torch.cuda.synchronize": synchronize,
        "torch.cuda.empty_cache": lambda: None,
        "torch.cuda.mem_get_info": lambda index=None: (max(device.free, 0), card.total_memory),
        "torch.cuda.memory_allocated": lambda index=None: device.allocated,
        "torch.cuda.memory_reserved": lambda index=None: device.allocated,
        "torch.cuda.max_memory_allocated": lambda index=None: device.peak,
        "torch.cuda.max_memory_reserved": lambda index=None: device.peak,
        "torch.cuda.reset_peak_memory_stats": reset_peak,
        "torch.cuda.memory_stats": memory_stats,
        "torch.cuda.get_rng_state": get_state,
        "torch.cuda.set_rng_state": set_state,
        "torch.cuda.get_rng_state_all": lambda: [get_state()],
        "torch.cuda.set_rng_state_all": lambda states: set_state(states[0]),
        "torch.cuda.manual_seed": seed,
        "torch.cuda.manual_seed_all": seed,
        "torch.cuda.current_stream": lambda index=None: _Inert(),
        "torch.cuda.Stream": _Inert,
        "torch.cuda.Event": _Inert,
        "torch.cuda.stream": lambda stream: _Inert(),
        "torch.cuda.device": lambda index: _Inert(),
        "torch.cuda.is_current_stream_capturing": lambda: False,
    }


def unavailable() -> str | None:
    """Return the reason why this machine or this torch cannot imitate a device, or None."""
    if torch.cuda.is_available():
        return "this machine has a CUDA device, which needs no imitation"
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        return "this version of torch has no Python backends"
    return None


@contextlib.contextmanager
def strict_device(
    card: Card | None = None, *, large: int | Callable[[Tensor], bool] | None = None, strict: bool = True
) -> Iterator[StrictDevice]:
    """Imitate one CUDA device inside the context.

    Args:
        card: Properties of the card. Defaults to a card of 24 GiB.
        large: Number of elements above which a result on the device is counted as large, or a function that returns True for
            large results. Defaults to no limit.
        strict: If True, a mix of devices raises `DeviceMixError`. Otherwise it is only counted.

    Raises:
        RuntimeError: The machine has a CUDA device, or torch is too old.
    """
    if (reason := unavailable()) is not None:
        raise RuntimeError(reason)
    _register_backend()
    # Torch collects the functions that ``with torch.device("meta")`` acts on at their first use: here, before some are replaced.
    _device_constructors()
    device = StrictDevice(card or Card(), large, strict)
    with contextlib.ExitStack() as stack:
        # Transformers would load weights in threads, which the imitation does not reach.
        stack.enter_context(mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}))
        # bitsandbytes keeps its code books on the device.
        stack.enter_context(mock.patch.dict("bitsandbytes.functional.name2qmap", clear=True))
        for name, replacement in _replacements(device).items():
            stack.enter_context(mock.patch(name, replacement))
        # Modules exchange whole tensors when they move, since `.data` of a CPU tensor cannot become a wrapper.
        stack.callback(
            torch.__future__.set_swap_module_params_on_conversion, torch.__future__.get_swap_module_params_on_conversion()
        )
        torch.__future__.set_swap_module_params_on_conversion(True)
        # torch.tensor(values, device="cuda:0") is made on the CPU and copied.
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.callback(setattr, StrictDevice, "_current", StrictDevice._current)
        StrictDevice._current = device
        stack.enter_context(device)
        yield device
