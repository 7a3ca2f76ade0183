"""Runs a Hopper kernel's own Gluon code without a GPU: on numpy, one thread a group of
warps, taking turns at random.

Triton's interpreter does not know Gluon. This stands for what a kernel with TMA,
`cp.async`, mbarriers and asynchronous products can get wrong: who waits for whom, which
bytes are where and when. It is as unkind as the hardware may be: a copy lands late, a
product reads its operands when it is waited for, a store its buffer too. Layouts,
registers and rounding are the compiler's, and are not looked at.
"""

import os
import random
import threading
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Callable, List, Optional
from unittest import mock

import numpy as np
import torch
from triton.runtime.jit import JITFunction

# As Triton was imported, else Gluon refuses what it takes from there.
INTERPRET = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
with mock.patch.dict(os.environ, INTERPRET):
    from triton.experimental.gluon import language as gl

BYTES = 2  # of an element, as the kernels count them
SWITCHES = 2_000_000


class Array(np.ndarray):
    """A tensor, or shared memory; a number is an array without dimensions."""

    def __array_wrap__(self, out, context=None, return_scalar=False):
        return np.asarray(out).view(Array)

    def __getitem__(self, at):
        return array(super().__getitem__(at))

    def to(self, dtype):
        return self.astype(np.int64) if dtype == "int32" else self

    def permute(self, order):
        return self.transpose(order)

    def split(self):
        return self[..., 0], self[..., 1]

    def index(self, i):
        return self[int(i)]

    def slice(self, first, count):
        return self[first : first + count]

    def load(self, layout):
        return self.copy()

    def store(self, x):
        self[...] = x
        _task().fenced = False


def array(x) -> Array:
    return np.asarray(x).view(Array)


class Pointer:
    def __init__(self, data: np.ndarray, offset=0):
        self.data, self.offset = data, offset

    def __add__(self, offset):
        return Pointer(self.data, self.offset + offset)


class Matrix:
    """A tensor descriptor."""

    dtype = "bfloat16"

    def __init__(self, tensor: torch.Tensor, block_shape: List[int], layout):
        self.data, self.block_shape = tensor.numpy(), block_shape

    def box(self, at, shape):
        """(Rows, columns) of a box, and which of them exist."""
        index = [first + np.arange(n) for first, n in zip(at, shape)]
        inside = [(0 <= i) & (i < n) for i, n in zip(index, self.data.shape)]
        return index, inside


class Barrier:
    def start(self, count):
        self.count = self.left = count
        self.bytes = self.phase = 0

    def arrive(self, count=1, copied=0):
        assert self.left >= count, "more arrivals than the barrier counts"
        self.left -= count
        self.bytes += copied
        if self.left == 0 and self.bytes == 0:
            self.phase ^= 1
            self.left = self.count

    def land(self, copied):
        assert self.bytes >= copied, "more bytes than the barrier expects"
        self.arrive(0, -copied)


class Barriers(list):
    def index(self, i):
        return self[int(i)]


class Task(threading.Thread):
    """A group of warps. It runs while the machine waits, and the other way around."""

    def __init__(self, machine, program: int, function: Callable, arguments: tuple):
        super().__init__(daemon=True)
        self.machine, self.program = machine, program
        self.function, self.arguments = function, arguments
        self.ready: Callable[[], bool] = lambda: True
        self.turn = threading.Semaphore(0)
        self.error: Optional[BaseException] = None
        self.done = False
        self.fenced = True
        self.rows: List[List[Callable]] = [[]]  # groups of cp.async
        self.landed: List[Callable] = []
        self.products: List[Callable] = []
        self.stores: List[Callable] = []

    def run(self):
        self.turn.acquire()
        try:
            self.function(*self.arguments)
            assert not self.stores, "ended before its stores had read their buffers"
        except BaseException as e:
            self.error = e
        self.done = True
        self.machine.back.release()

    def pause(self, ready=lambda: True):
        self.ready = ready
        self.machine.back.release()
        self.turn.acquire()
        if self.machine.over:
            raise SystemExit


def _task() -> Task:
    return threading.current_thread()


class Machine:
    """One launch."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.back = threading.Semaphore(0)
        self.tasks: List[Task] = []
        self.flights: List[Callable] = []
        self.over = False

    def run(self):
        waiting = list(self.tasks)
        for task in waiting:
            task.start()
        try:
            for _ in range(SWITCHES):
                waiting = [t for t in waiting if not t.done]
                if not waiting:
                    assert not self.flights, "ended before its copies had landed"
                    return
                ready = [t for t in waiting if t.ready()]
                assert ready or self.flights, "all wait for each other"
                if self.flights and (not ready or self.random.random() < 0.2):
                    at = self.random.randrange(len(self.flights))
                    self.flights.pop(at)()
                    continue
                task = self.random.choice(ready)
                task.turn.release()
                self.back.acquire()
                if task.error:
                    raise task.error
            raise AssertionError("does not end")
        finally:
            self.over = True
            for task in waiting:
                task.turn.release()


def _load(pointer, mask=True, other=0):
    at = np.where(mask, pointer.offset, 0)
    return array(np.where(mask, pointer.data[at], other))


def _atomic_add(pointer, value, sem):
    _task().pause()
    old = int(pointer.data[pointer.offset])
    pointer.data[pointer.offset] += value
    return old


def _allocate(dtype, shape, layout):
    if layout == "barriers":
        return Barriers(Barrier() for _ in range(shape[0]))
    return array(np.full(shape, 0 if dtype == "int32" else np.nan))


def _wait(bar, parity):
    _task().pause(lambda: bar.phase != parity)


def _arrive(bar, count=1):
    bar.arrive(count)
    _task().pause()


def _copy_in(desc, at, bar, to):
    index, inside = desc.box(at, to.shape)

    def land():
        to[...] = 0
        to[np.ix_(*inside)] = desc.data[np.ix_(*(i[m] for i, m in zip(index, inside)))]
        bar.land(to.size * BYTES)

    assert to.shape == tuple(desc.block_shape)
    _task().machine.flights.append(land)


def _copy_out(desc, at, buf):
    assert _task().fenced, "a store reads what it may not see yet"
    index, inside = desc.box(at, buf.shape)

    def read():
        # A copy of rows and columns that another tile has too would be a fault.
        window = np.ix_(*(i[m] for i, m in zip(index, inside)))
        assert np.isnan(desc.data[window]).all(), "stored twice"
        desc.data[window] = buf[np.ix_(*inside)]

    assert buf.shape == tuple(desc.block_shape)
    _task().stores.append(read)


def _finish(queue, pending):
    _task().pause()
    while len(queue) > pending:
        queue.pop(0)()


def _gather(to, pointer):
    def land():
        to[...] = pointer.data[pointer.offset]

    _task().rows[-1].append(land)


def _wait_group(pending):
    task = _task()
    while len(task.rows) - 1 > pending:
        task.landed += task.rows.pop(0)


def _fence():
    task = _task()
    for land in task.landed:
        land()
    task.landed.clear()
    task.fenced = True


def _product(a, b, acc, use_acc, is_async):
    def compute():
        acc[...] = acc * bool(use_acc) + a @ b

    _task().products.append(compute)
    return acc


def _product_wait(pending, deps):
    _finish(_task().products, pending)
    return deps[0]


def _argument(x):
    return Pointer(x.numpy().reshape(-1)) if isinstance(x, torch.Tensor) else x


LAYOUTS = (
    *("BlockedLayout", "SliceLayout", "NVMMADistributedLayout"),
    *("NVMMASharedLayout", "SwizzledSharedLayout"),
)
NAMES = dict(
    mbarrier=SimpleNamespace(
        MBarrierLayout=lambda: "barriers",
        init=lambda bar, count: bar.start(count),
        wait=_wait,
        arrive=_arrive,
        expect=lambda bar, copied: bar.arrive(1, copied),
    ),
    tma=SimpleNamespace(
        async_copy_global_to_shared=_copy_in,
        async_copy_shared_to_global=_copy_out,
        store_wait=lambda pending: _finish(_task().stores, pending),
    ),
    async_copy=SimpleNamespace(
        async_copy_global_to_shared=_gather,
        commit_group=lambda: _task().rows.append([]),
        wait_group=_wait_group,
    ),
    fence_async_shared=_fence,
    warpgroup_mma=_product,
    warpgroup_mma_wait=_product_wait,
)


class Kernel:
    """Stands for a module's kernel, launched as usual."""

    def __init__(self, module: ModuleType, name: str, seed: int):
        self.module, self.function = module, getattr(module, name).fn
        self.seed = seed

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launch(grid[0], args, kwargs)

    def launch(self, programs: int, args, kwargs):
        machine = Machine(self.seed)
        language = SimpleNamespace(
            int32="int32",
            int64="int64",
            float32="float32",
            static_range=range,
            num_warps=lambda: 4,
            num_programs=lambda axis: programs,
            program_id=lambda axis: _task().program,
            load=_load,
            atomic_add=_atomic_add,
            arange=lambda first, end, layout: array(np.arange(first, end)),
            full=lambda shape, value, dtype, layout: array(np.full(shape, value)),
            where=lambda c, a, b: array(np.where(c, a, b)),
            max=lambda x, axis: x.max(axis),
            minimum=min,
            inline_asm_elementwise=lambda asm, c, xs, **_: array(np.tanh(xs[0])),
            allocate_shared_memory=_allocate,
            warp_specialize=lambda parts, warps, registers: machine.tasks.extend(
                Task(machine, program, *part) for part in parts
            ),
            **dict.fromkeys(LAYOUTS, lambda *_: None),
        )
        names = dict(NAMES, gl=language)
        for name, value in vars(self.module).items():
            if isinstance(value, JITFunction):
                names[name] = value.fn
            elif isinstance(value, gl.constexpr):
                names[name] = value.value
        takes = self.function.__code__.co_varnames
        with mock.patch.dict(vars(self.module), names):
            for program in range(programs):
                self.function(
                    *map(_argument, args),
                    **{k: v for k, v in kwargs.items() if k in takes},
                )
            machine.run()


@contextmanager
def on_numpy(module: ModuleType, name: str, seed: int):
    """Launches of the module's kernel `name` run here, on float32 tensors."""
    names = {name: Kernel(module, name, seed)}
    names["TensorDescriptor"] = SimpleNamespace(from_tensor=Matrix)
    with mock.patch.multiple(module, **names):
        yield
