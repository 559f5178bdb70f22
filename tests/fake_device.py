"""A GPU that is not there: tensors with real data on the CPU that say they are on `cuda:0`, `cuda:1` or `mps:0`.

What a real device refuses is refused here with the same error: operations on tensors of several devices, NumPy views of
its tensors, and on Apple's GPUs float64 and every operation that PyTorch has no MPS kernel for. What a real device
allows but punishes is counted: launches, waits of the host for the device (syncs), copies to it (uploads), and sums
whose order is not fixed, such as `scatter_add_` with equal indices.

PyTorch's int4 product for CUDA has no CPU form, so it is computed from a packed layout of this file's own.

A CUDA graph is recorded and replayed as a real one is: replaying it launches the same operations on the same memory
with the same numbers, and what a real one refuses while it records, the host's memory and its waiting, is refused.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # what dispatching to Python imports on its first use
import torch.distributed.tensor
import torchgen
import yaml
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gemma_awq_cli.kernels import column_loops, file_int4, head, mps, step_ops
from gemma_awq_cli.kernels import cuda as cuda_kernel

ATEN = torch.ops.aten
CPU = torch.device("cpu")
_FACTORIES = {
    torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.tensor, torch.eye,
    torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, torch.randint, torch.linspace,
    torch.as_tensor, torch.scalar_tensor,
}  # fmt: skip
_LIKE = {torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like}
_FROM_HOST = {torch.tensor, torch.as_tensor}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # which take indices on the CPU too
_NO_LAUNCH = {
    "empty", "empty_like", "new_empty", "empty_strided", "detach", "alias", "lift_fresh", "resize_", "set_",
    "is_same_size", "sym_size", "new_empty_strided", "_unsafe_view",
}  # fmt: skip
_WAITS = {"nonzero", "masked_select", "unique_dim", "_unique2", "_local_scalar_dense", "equal", "is_nonzero"}
# Floating-point sums of CUDA whose order differs from run to run (torch.use_deterministic_algorithms lists them).
_UNORDERED = {"cumsum", "cumsum_", "cumprod", "histc", "_histc", "scatter_reduce", "scatter_reduce_"}
_COLLIDING = {"index_add", "index_add_", "scatter_add", "scatter_add_", "scatter", "scatter_", "index_copy_"}
INT4_TILE = (8, 128)  # outputs and inputs


class FakeTensor(torch.Tensor):
    """A tensor on a fake device. data_on_cpu: what it holds."""

    data_on_cpu: Tensor
    place: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: Tensor, place: torch.device) -> "FakeTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype, device=CPU
        )
        made.data_on_cpu, made.place = data, place
        return made

    device = property(lambda self: self.place)  # type: ignore[assignment]
    is_cuda = property(lambda self: self.place.type == "cuda")  # type: ignore[assignment]
    is_mps = property(lambda self: self.place.type == "mps")  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"FakeTensor({self.data_on_cpu}, {self.place})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:  # accelerate knows tied parameters by it
        return self.data_on_cpu.data_ptr()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {self.place} device type tensor to numpy. Use Tensor.cpu() first.")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _current().run(func, args, kwargs or {})


_ACTIVE: list["FakeDevice"] = []


def _current() -> "FakeDevice":
    assert _ACTIVE, "a fake tensor outlives its device"
    return _ACTIVE[-1]


@dataclass
class FakeDevice:
    """What happened on the devices since `reset`.

    kind: `cuda` or `mps`; count: how many there are; free: bytes that each says are free, total: that it has; peak:
    what it says was allocated at most; capability: of CUDA devices. launches: kernels by the operation that started
    them; syncs, uploads: by operation; unordered: operations whose sums have no fixed order; replays: of graphs, each
    of which is one launch; uploaded: tensors by the dtype in which they travelled, and their shape.
    """

    kind: str = "cuda"
    count: int = 1
    free: int = 78 << 30
    total: int = 80 << 30
    peak: int = 123_456_789
    capability: tuple[int, int] = (7, 5)
    launches: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    unordered: Counter[str] = field(default_factory=Counter)
    replays: int = 0
    uploaded: Counter[tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=Counter)
    recording: list[tuple[Any, Any, Any, Any]] | None = None

    def reset(self) -> None:
        """Forget what happened."""
        for counter in (self.launches, self.syncs, self.uploads, self.unordered):
            counter.clear()
        self.uploaded.clear()
        self.replays = 0

    def place(self, device: Any) -> torch.device | None:
        """The fake device that an argument names, or None for the CPU and the meta device."""
        if device is None:
            return None
        named = torch.device(device) if not isinstance(device, int) else torch.device(self.kind, device)
        if named.type != self.kind:
            return None
        return torch.device(named.type, named.index or 0)

    def on(self, tensor: Tensor, index: int = 0) -> Tensor:
        """A copy of a CPU tensor on a device."""
        return FakeTensor(tensor.clone(), torch.device(self.kind, index))

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Do one operation of ATen as the device would."""
        if self.recording is None:
            return self._run(func, args, kwargs)
        waits, uploads = sum(self.syncs.values()), sum(self.uploads.values())
        out = self._run(func, args, kwargs)
        if sum(self.syncs.values()) > waits or sum(self.uploads.values()) > uploads:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({func})")
        if any(isinstance(one, FakeTensor) for one in _tensors([out, *args, *kwargs.values()])):
            self.recording.append((func, args, kwargs, out))
        return out

    def replay(self, recorded: Sequence[tuple[Any, Any, Any, Any]]) -> None:
        """Do recorded operations again, each on the memory that it had, and with the results where they were."""
        for func, args, kwargs, out in recorded:
            bare = {key: CPU if key == "device" and value is not None else value for key, value in kwargs.items()}
            again = self._int4(func.overloadpacket.__name__, _mapped(_bare, args))
            if again is None:
                again = func(*_mapped(_bare, args), **{key: _mapped(_bare, value) for key, value in bare.items()})
            for old, new in zip(_tensors([out]), _tensors([again]), strict=True):
                if old.numel() and _bare(old).data_ptr() != _bare(new).data_ptr():
                    _bare(old).copy_(new)

    def _run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        name = func.overloadpacket.__name__
        if func is torch.ops.prim.device.default:
            return args[0].device
        if name == "_to_copy":
            return self._copied(func, args[0], dict(kwargs))
        if name == "copy_":
            return self._copied_into(func, *args)
        given = _tensors(args) + _tensors(kwargs.values())
        fakes = [one for one in given if isinstance(one, FakeTensor)]
        asked = self.place(kwargs.get("device"))
        place = fakes[0].place if fakes else asked
        if place is None:
            return func(*args, **kwargs)
        self._require_one_place(name, args, given, place)
        self._require_supported(func, place)
        self._note(name, args, kwargs, given)
        if "device" in kwargs and asked is not None:
            kwargs = {**kwargs, "device": CPU}
        bare_args = _mapped(_bare, args)
        bare_kwargs = {key: _mapped(_bare, value) for key, value in kwargs.items()}
        own = self._int4(name, bare_args)
        out = own if own is not None else func(*bare_args, **bare_kwargs)
        if not _is_view(func) and name not in _NO_LAUNCH and name not in _WAITS and (out is None or _any_elements(out)):
            self.launches[name] += 1
        known = {id(fake.data_on_cpu): fake for fake in fakes}

        def dressed(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in known:
                return known[id(value)]
            target = asked or place
            self._require_dtype(value.dtype, target)
            return FakeTensor(value, target) if self.place(target) else value

        if "device" in kwargs and asked is None and kwargs["device"] is not None:
            return out  # a factory that takes a fake tensor's shape, and makes a CPU or meta tensor
        return _mapped(dressed, out)

    def _copied(self, func: Any, source: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """`_to_copy`: between devices and dtypes."""
        given = kwargs.pop("device", None)
        kwargs.pop("pin_memory", None)
        origin = source.place if isinstance(source, FakeTensor) else None
        target = origin if given is None else self.place(given)
        if given is not None and torch.device(given).type == "meta":
            return func(_bare(source), **kwargs, device=given)
        dtype = kwargs.get("dtype") or source.dtype
        for place in (origin, target):
            if place is not None:  # Apple's GPUs convert before they copy
                self._require_dtype(dtype if origin is not None else source.dtype if place is origin else dtype, place)
        if origin is not None and target is None:
            self.syncs["to the CPU"] += 1
        elif origin is None and target is not None:
            self.uploads["to the device"] += 1
            self.uploaded[(dtype, tuple(source.shape))] += 1
        if origin is not None or target is not None:
            self.launches["_to_copy"] += 1
        bare = _bare(source)
        made = func(bare, **kwargs)
        made = made.clone() if made is bare else made
        return made if target is None else FakeTensor(made, target)

    def _copied_into(self, func: Any, target: Tensor, source: Tensor, *rest: Any) -> Tensor:
        """`copy_`, which may be between devices."""
        if isinstance(target, FakeTensor) != isinstance(source, FakeTensor):
            (self.uploads if isinstance(target, FakeTensor) else self.syncs)["copy_"] += 1
        if isinstance(target, FakeTensor) or isinstance(source, FakeTensor):
            self.launches["copy_"] += 1
        if isinstance(source, FakeTensor):
            self._require_dtype(target.dtype, source.place)
        func(_bare(target), _bare(source), *rest)
        return target

    def _require_one_place(self, name: str, args: Sequence[Any], given: Sequence[Tensor], place: torch.device) -> None:
        """What a device refuses: tensors of several devices, unless they are numbers on the CPU or indices."""
        others = []
        for one in given:
            is_number = not isinstance(one, FakeTensor) and one.dim() == 0
            if not is_number and (not isinstance(one, FakeTensor) or one.place != place):
                others.append(one)
        if name in _INDEXING and isinstance(args[0], FakeTensor):
            indices = [id(index) for index in args[1] if isinstance(index, torch.Tensor)]
            allowed = [one for one in others if id(one) in indices and not isinstance(one, FakeTensor)]
            self.uploads["index"] += len(allowed)
            others = [one for one in others if not any(one is other for other in allowed)]
        if others:
            places = ", ".join(sorted({str(one.device) for one in given}))
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got {places}")

    def _require_supported(self, func: Any, place: torch.device) -> None:
        if place.type == "mps" and func._schema.name.removeprefix("aten::") + _overload(func) in _without_mps():
            raise NotImplementedError(f"The operator '{func}' is not currently implemented for the MPS device.")

    def _require_dtype(self, dtype: torch.dtype, place: torch.device) -> None:
        if dtype == torch.float64 and place.type == "mps":
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")

    def _note(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], given: Sequence[Tensor]) -> None:
        if name in _WAITS:
            self.syncs[name] += 1
        if name in _INDEXING and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
        ):
            self.syncs["boolean index"] += 1
        floats = any(one.is_floating_point() for one in given)
        if name in _UNORDERED and floats:
            self.unordered[name] += 1
        if name == "bincount" and len(args) > 1:
            self.unordered[name] += 1
        if name in _COLLIDING and floats and _collides(name, args):
            self.unordered[name] += 1
        if name in ("index_put", "index_put_", "_index_put_impl_") and floats and _indices_collide(args):
            self.unordered[name] += 1

    def _int4(self, name: str, args: Sequence[Any]) -> Tensor | None:
        """PyTorch's int4 operations for CUDA, in a layout of this file's own; None for another operation."""
        if name == "_convert_weight_to_int4pack":
            q, inner_tiles = args
            assert q.dtype == torch.uint8
            assert q.is_contiguous()
            return _pack_int4(q, inner_tiles)
        if name == "_weight_int4pack_mm":
            x, packed, group, scale_zero = args
            assert x.dtype == scale_zero.dtype == torch.bfloat16
            assert x.is_contiguous()
            assert packed.is_contiguous()
            q = _unpack_int4(packed).to(torch.float32) - 8
            scale, zero = (part.t().to(torch.float32).repeat_interleave(group, 1) for part in scale_zero.unbind(-1))
            return x @ (q * scale + zero).to(torch.bfloat16).t()
        return None


def _bare(value: Any) -> Any:
    return value.data_on_cpu if isinstance(value, FakeTensor) else value


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """The value with all tensors in its lists and tuples changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([_mapped(change, one) for one in value])
    return value


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _overload(func: Any) -> str:
    return "" if func._overloadname == "default" else f".{func._overloadname}"


def _any_elements(out: Any) -> bool:
    return any(one.numel() for one in _tensors([out]))


def _collides(name: str, args: Sequence[Any]) -> bool:
    """Whether an operation along a dimension writes to an element more than once."""
    target, dim, index = (_bare(arg) for arg in args[:3])
    if name.startswith("index") or index.dim() == 0:
        return index.unique().numel() < index.numel()
    if index.numel() == 0:
        return False
    places = list(torch.meshgrid(*(torch.arange(size) for size in index.shape), indexing="ij"))
    places[dim] = index
    flat = torch.zeros_like(index)
    for size, place in zip(target.shape, places, strict=True):
        flat = flat * size + place
    return flat.unique().numel() < flat.numel()


def _indices_collide(args: Sequence[Any]) -> bool:
    indices = [_bare(index) for index in args[1] if index is not None]
    if any(index.dtype == torch.bool for index in indices):
        return False
    flat = torch.stack([index.flatten() for index in torch.broadcast_tensors(*indices)])
    return flat.unique(dim=1).shape[1] < flat.shape[1]


@cache
def _is_view(func: Any) -> bool:
    aliases = [returned.alias_info is not None for returned in func._schema.returns]
    return bool(aliases) and all(aliases) and not func._schema.is_mutable


@cache
def _without_mps() -> frozenset[str]:
    """The operations that PyTorch has kernels for, but none for Apple's GPUs, by its own list of operations."""
    path = os.path.join(os.path.dirname(torchgen.__file__), "packaged/ATen/native/native_functions.yaml")
    with open(path, encoding="utf-8") as file:
        entries = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    by_name = {entry["func"].partition("(")[0]: entry for entry in entries}

    def runs(entry: Mapping[str, Any]) -> bool:
        if "structured_delegate" in entry:
            return runs(by_name[entry["structured_delegate"]])
        keys = {key.strip() for keys in entry.get("dispatch", {"Composite": ""}) for key in keys.split(",")}
        return any(key == "MPS" or key.startswith("Composite") for key in keys)

    return frozenset(name for name, entry in by_name.items() if not runs(entry))


def _pack_int4(q: Tensor, inner_tiles: int) -> Tensor:
    """Bytes [N, K / 2] of two nibbles each to int32 [N / 8, K / 128, 32, 4], the shape that CUDA's operation has."""
    assert inner_tiles * 16 == INT4_TILE[1]
    outputs, inputs = q.shape[0], 2 * q.shape[1]
    tiles = q.view(outputs // INT4_TILE[0], INT4_TILE[0], inputs // INT4_TILE[1], INT4_TILE[1] // 2).transpose(1, 2)
    # not the order of the values: who reads it must have found it out
    return tiles.reshape(*tiles.shape[:2], -1).flip(-1).contiguous().view(torch.int32).view(*tiles.shape[:2], 32, 4)


def _unpack_int4(packed: Tensor) -> Tensor:
    bytes_ = packed.contiguous().view(*packed.shape[:2], -1).view(torch.uint8).flip(-1)
    tiles = bytes_.unflatten(-1, (INT4_TILE[0], INT4_TILE[1] // 2)).transpose(1, 2)
    both = torch.stack([tiles >> 4, tiles & 15], -1)
    return both.reshape(packed.shape[0] * INT4_TILE[0], packed.shape[1] * INT4_TILE[1])


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _current().run(func, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """Makes tensors on the fake device, and moves tensors to it: calls that the CPU's build would refuse."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, device = dict(kwargs or {}), _current()
        if func in _FACTORIES and (place := device.place(kwargs.get("device"))) is not None:
            return self._made(device, func, args, kwargs, place)
        if func in (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu):
            return self._moved(device, func, args, kwargs)
        return func(*args, **kwargs)

    def _made(self, device: FakeDevice, func: Any, args: Any, kwargs: dict[str, Any], place: torch.device) -> Tensor:
        if func in _LIKE:
            args = (_bare(args[0]), *args[1:])
        if func in _FROM_HOST:
            device.uploads[func.__name__] += 1
        elif func not in (torch.empty, torch.empty_like):
            device.launches[func.__name__] += 1
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            made = func(*args, **{**kwargs, "device": CPU})
        device._require_dtype(made.dtype, place)
        return FakeTensor(made, place)

    def _moved(self, device: FakeDevice, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        source, target, dtype = args[0], kwargs.get("device"), kwargs.get("dtype")
        if func is not torch.Tensor.to:
            target = "cuda" if func is torch.Tensor.cuda else "cpu"
        for given in args[1:]:
            if isinstance(given, torch.device | str | int) and not isinstance(given, bool):
                target = given
            elif isinstance(given, torch.dtype):
                dtype = given
            elif isinstance(given, torch.Tensor):
                target, dtype = given.device, given.dtype
        origin = source.place if isinstance(source, FakeTensor) else source.device
        wanted = origin if target is None else device.place(target) or torch.device(target)
        dtype = dtype or source.dtype
        if wanted == origin and dtype == source.dtype and not kwargs.get("copy", False):
            return source
        if not isinstance(source, FakeTensor) and device.place(wanted) is None:
            return func(*args, **kwargs)
        return device.run(ATEN._to_copy.default, (source,), {"dtype": dtype, "device": wanted})


_RealGenerator = torch.Generator


class _Generator(torch.Generator):
    """A generator on the CPU for every device."""

    def __new__(cls, device: Any = None) -> torch.Generator:  # type: ignore[misc]
        return _RealGenerator("cpu" if device is None or _current().place(device) else device)


class _Graph:
    """A CUDA graph: the operations that ran while it was recorded."""

    def __init__(self) -> None:
        self._recorded: list[tuple[Any, Any, Any, Any]] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        device = _current()
        assert device.recording is None, "two graphs are recorded at once"
        device.recording = self._recorded
        launches = Counter(device.launches)
        try:
            yield
        finally:
            device.recording, device.launches = None, launches  # recording launches nothing

    def replay(self) -> None:
        device = _current()
        device.replays += 1
        device.launches["graph"] += 1
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            device.replay(self._recorded)


class _Event:
    """A mark in the device's queue, which is always empty."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._at = 0.0

    def record(self, *_: Any) -> None:
        import time

        self._at = time.perf_counter()

    def synchronize(self) -> None:
        _current().syncs["event"] += 1

    def elapsed_time(self, other: "_Event") -> float:
        return 1000 * (other._at - self._at)


def _forget() -> None:
    """Forget what was found out about a device of the same name."""
    cuda_kernel._order.cache_clear()
    cuda_kernel._problem.cache_clear()
    mps._problem.cache_clear()
    file_int4._problem.cache_clear()
    head._int8_problem.cache_clear()
    step_ops.steps_problem.cache_clear()
    column_loops.columns_problem.cache_clear()


@contextmanager
def fake_device(kind: str = "cuda", **facts: Any) -> Iterator[FakeDevice]:
    """Give torch fake devices of a kind. facts: the fields of `FakeDevice`."""
    if not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        import pytest

        pytest.skip("this torch cannot have fake devices")
    torch._C._ensureCUDADeviceGuardSet()
    device = FakeDevice(kind, **facts)
    is_cuda = kind == "cuda"
    patches: list[tuple[Any, str, Callable[..., Any]]] = [
        (torch.cuda, "is_available", lambda: is_cuda),
        (torch.cuda, "device_count", lambda: device.count if is_cuda else 0),
        (torch.cuda, "get_device_name", lambda *_: "A GPU that is not there"),
        (torch.cuda, "get_device_capability", lambda *_: device.capability),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: device.capability[0] >= 8),
        (torch.cuda, "mem_get_info", lambda *_: (device.free, device.total)),
        (torch.cuda, "max_memory_allocated", lambda *_: device.peak),
        (torch.cuda, "synchronize", lambda *_: None),
        (torch.cuda, "current_stream", lambda *_: None),
        (torch.cuda, "Event", _Event),
        (torch.cuda, "CUDAGraph", _Graph),
        (torch.cuda, "graph", lambda graph, pool=None: graph.recorded()),
        (torch.cuda, "graph_pool_handle", lambda: (0, 1)),
        (torch.cuda, "device", lambda *_: nullcontext()),
        # what it would ask, a torch with CUDA asks the driver
        (torch.accelerator, "current_accelerator", lambda *_, **__: None),
        (torch.backends.cuda, "is_built", lambda: False),  # memory that the driver would pin
        (torch.backends.mps, "is_available", lambda: not is_cuda),
        (torch, "Generator", _Generator),
    ]
    _forget()
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        _ACTIVE.append(device)
        stack.callback(_ACTIVE.pop)
        stack.callback(_forget)
        stack.enter_context(_Calls())
        stack.enter_context(_Operations())
        yield device
