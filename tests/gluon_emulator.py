"""Runs kernels/weight_stream.py on a CPU: its device code as plain Python on tensors.

Triton's interpreter knows neither Gluon's barriers nor its partitions. Here every part of every
program is a thread, barriers in shared memory count as Hopper's do, and whoever waits for too long
raises. What it does not show: layouts, races between the threads of one part, orders of memory.
"""

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from draftnorm.kernels import stream_copies, stream_layouts, weight_stream

PATIENCE = 30.0  # seconds that a wait may take
CONSTANTS = "L SLAB COLUMNS TICKETS FINISHED _FLIGHT O_PROJ GATE_UP DOWN QKV".split()
COPY_THREADS = 64  # of the part that copies rows, each of which arrives


class Value(Tensor):
    """A tensor in registers, whose type has a layout."""

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(layout=None)


class Pointer:
    def __init__(self, memory: Tensor, offset: int | Tensor = 0) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: int | Tensor) -> "Pointer":
        return Pointer(self.memory, self.offset + offset)

    def places(self, mask: Tensor | None, *others: object) -> list[Tensor]:
        """Where it points, and `others` there, as far as `mask` goes; all within bounds."""
        tensors = [torch.as_tensor(x).as_subclass(Tensor) for x in (self.offset, *others)]
        if mask is None:
            mask = torch.ones((), dtype=torch.bool)
        *tensors, mask = torch.broadcast_tensors(*tensors, mask.as_subclass(Tensor))
        found = tensors[0][mask].long()
        assert ((found >= 0) & (found < self.memory.numel())).all(), "out of bounds"
        return [found, *(x[mask] for x in tensors[1:]), mask]


def load(pointer: Pointer, mask: Tensor | None = None, other: float = 0.0, **_: object) -> Tensor:
    places, mask = pointer.places(mask)
    values = torch.full(mask.shape, other, dtype=pointer.memory.dtype)
    values[mask] = pointer.memory[places]
    return values.as_subclass(Value)


def store(pointer: Pointer, values: object, mask: Tensor | None = None) -> None:
    places, values, _ = pointer.places(mask, values)
    pointer.memory[places] = values.to(pointer.memory.dtype)


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    b, c = (x.double() if isinstance(x, Tensor) else x for x in (b, c))
    return (a.double() * b + c).float()


class Barrier:
    """64 bits of shared memory: arrivals and bytes that its phase still waits for, or a number."""

    def __init__(self) -> None:
        self.changed, self.phase, self.bytes = threading.Condition(), 0, 0
        self.number = self.count = self.left = -1

    def init(self, count: int) -> None:
        self.count = self.left = count

    def arrive(self, count: int = 1, bytes: int = 0) -> None:
        with self.changed:
            self.left -= count
            self.bytes += bytes
            assert self.left >= 0, "more arrivals than a phase has"
            if self.left == self.bytes == 0:
                self.phase, self.left = self.phase + 1, self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase % 2 != parity, PATIENCE):
                raise TimeoutError("a barrier in shared memory")

    def load(self, _: object) -> Tensor:
        return torch.tensor([self.number])

    def store(self, number: int) -> None:
        self.number = number


class Shared:
    """Shared memory, full of NaN until it is written."""

    def __init__(self, data: Tensor | list[Barrier]) -> None:
        self.data, self.dtype = data, getattr(data, "dtype", None)

    def index(self, i: int) -> "Shared | Barrier":
        chosen = self.data[int(i)]
        return Shared(chosen) if isinstance(chosen, Tensor) else chosen

    def reshape(self, shape: list[int]) -> "Shared":
        return Shared(self.data.view(shape))

    def permute(self, order: list[int]) -> "Shared":
        return Shared(self.data.permute(order))

    def load(self, _: object) -> Tensor:
        return self.data.clone().as_subclass(Value)

    def store(self, values: Tensor) -> None:
        self.data.copy_(values)


class Emulator:
    """Stands in for the kernel's launcher and for `gl`, of as many programs as it is told."""

    def __init__(self, patch: pytest.MonkeyPatch, programs: int) -> None:
        self.programs, self.here, self.lock = programs, threading.local(), threading.Lock()
        self.kernel = weight_stream._weight_stream_kernel.fn
        self.errors: list[BaseException] = []
        none = lambda *_: None  # noqa: E731
        arange = lambda first, end, _: torch.arange(first, end).as_subclass(Value)  # noqa: E731
        language = SimpleNamespace(
            constexpr=None, int32=torch.int32, int64=torch.int64, float32=torch.float32,
            BlockedLayout=none, SliceLayout=none, SwizzledSharedLayout=none,
            DistributedLinearLayout=none, static_range=range, maximum=max, arange=arange,
            program_id=lambda _: self.here.program, num_programs=lambda _: self.programs,
            cdiv=lambda a, b: -(-a // b), full=lambda shape, value, *_: value,
            zeros=lambda shape, *_: torch.zeros(shape),
            zeros_like=torch.zeros_like, load=load, store=store, atomic_add=self.atomic_add,
            permute=lambda x, order: x.permute(tuple(order)), fma=fma, rsqrt=torch.rsqrt,
            reshape=lambda x, shape: x.reshape(tuple(shape)), exp=torch.exp,
            split=lambda x: x.unbind(-1), convert_layout=lambda x, _: x, to_tensor=torch.as_tensor,
            max=lambda x, axis: int(x.max(axis)[0]), warp_specialize=self.specialize,
            allocate_shared_memory=self.allocate,
        )  # fmt: skip
        barriers = SimpleNamespace(
            MBarrierLayout=lambda: Barrier, init=Barrier.init, wait=Barrier.wait,
            arrive=Barrier.arrive, expect=lambda barrier, bytes: barrier.arrive(bytes=bytes),
        )  # fmt: skip
        for module in (weight_stream, stream_copies, stream_layouts):
            for name, value in [*vars(module).items()]:
                if isinstance(value, JITFunction):
                    patch.setattr(module, name, value.fn)
            patch.setattr(module, "gl", language)
        for module in (weight_stream, stream_copies):
            patch.setattr(module, "mbarrier", barriers)
            patch.setattr(module, "gdc_wait", none)
            patch.setattr(module, "thread_barrier", none)
            for name in CONSTANTS:
                if name in vars(module):
                    patch.setattr(module, name, Constant(getattr(stream_copies, name)))
        patch.setattr(stream_copies, "gdc_launch_dependents", none)
        patch.setattr(stream_copies, "tma", SimpleNamespace(async_copy_global_to_shared=bulk_copy))
        copies = SimpleNamespace(
            async_copy_global_to_shared=lambda to, pointers, mask: to.store(load(pointers, mask)),
            mbarrier_arrive=lambda barrier, increment_count: barrier.arrive(COPY_THREADS),
        )
        patch.setattr(stream_copies, "async_copy", copies)
        patch.setattr(stream_copies, "_arrivals", self.arrivals)
        patch.setattr(
            weight_stream, "mma_v2", lambda a, b, c: (c + a.double() @ b.double()).float()
        )
        patch.setattr(weight_stream, "fence_async_shared", none)
        patch.setattr(weight_stream, "_weight_stream_kernel", self)
        properties = SimpleNamespace(multi_processor_count=programs)
        patch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

    def __getitem__(self, grid: tuple[int]) -> Callable:
        assert grid == (self.programs,)
        return self.launch

    def launch(self, *arguments: object, **_: object) -> None:
        values = [self.argument(value) for value in arguments]
        self.together([(self.kernel, values, program) for program in range(self.programs)])

    def argument(self, value: object) -> object:
        if isinstance(value, weight_stream.TensorDescriptor):
            view = value.base.as_strided(value.shape, value.strides)
            nbytes = 2 * torch.Size(value.block_shape).numel()
            return SimpleNamespace(view=view, block_type=SimpleNamespace(nbytes=nbytes))
        if isinstance(value, Tensor):  # and what lies behind it, as a pointer has no end
            elements = value.untyped_storage().nbytes() // value.itemsize - value.storage_offset()
            return Pointer(value.as_strided((elements,), (1,)))
        return value

    def together(self, jobs: list[tuple[Callable, list, int]]) -> None:
        def run(function: Callable, arguments: list, program: int) -> None:
            self.here.program, self.here.deadline = program, time.monotonic() + PATIENCE
            try:
                function(*arguments)
            except BaseException as error:
                self.errors.append(error)

        threads = [threading.Thread(target=run, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def specialize(self, parts: list[tuple[Callable, tuple]], *_: object) -> None:
        self.together([(part, arguments, self.here.program) for part, arguments in parts])

    def atomic_add(self, pointer: Pointer, value: int, sem: str) -> Tensor:
        with self.lock:
            before = pointer.memory[pointer.offset].clone()
            pointer.memory[pointer.offset] += value
        return before

    def arrivals(self, counter: Pointer) -> Tensor:
        time.sleep(0.0005)
        if time.monotonic() > self.here.deadline:
            raise TimeoutError("a counter in global memory")
        return counter.memory[counter.offset].clone()

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: object) -> Shared:
        if layout is Barrier:
            return Shared([Barrier() for _ in range(shape[0])])
        return Shared(torch.full(shape, torch.nan, dtype=dtype))


class Constant(int):
    """A number, also where the host asks a constexpr for its value."""

    @property
    def value(self) -> int:
        return int(self)


def bulk_copy(weight: SimpleNamespace, place: list[int], barrier: Barrier, to: Shared) -> None:
    slab, _, line, _ = map(int, place)
    to.store(weight.view[slab : slab + 8, :, line : line + 8])
    barrier.arrive(0, bytes=-weight.block_type.nbytes)
