"""Checks every interpreted Triton launch: bounds, masked-off lanes, uninitialised memory, races.

The interpreter reads and writes whatever address a kernel computes, in order, one program at a
time, and answers 0 where a mask is off. A GPU does none of that, so a faulty kernel passes here
and fails there. Under `install()`

- a kernel sees made-up addresses, a range of 2**48 bytes for each storage, and every unmasked lane
  has to lie inside the tensors that were passed: no stride is so wrong that it hits another one;
- lanes that a mask turns off, in loads without `other`, hold NaN or a huge integer;
- what `sparsekern.kernels` allocates starts as NaN or a huge integer;
- two programs, or two lanes of a store, may not write one address; no program may touch what
  another one writes; atomics are refused;
- programs run in a shuffled order, the same for the same `seed`.

Tensors on the meta device stand for memory that is not there: loads give zeros, stores go nowhere,
both are checked. With `only_programs` a huge launch is cut down to a few programs.
"""

# ruff: noqa: ARG001  (the signatures are triton's)
import functools
import inspect
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
import triton.language as tl
from shadow import Launch, SanitizerError, garbage
from torch.utils._device import _device_constructors
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

_GUARDED = "sparsekern.kernels"
_ATOMICS = ("cas", "load", "store", "poll", "rmw")
_ALLOCATORS = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))

# started: kernel launches; sanitized: those whose programs all ran checked; refused: those that
# raised. When nothing is running, started == sanitized + refused.
counts = SimpleNamespace(started=0, sanitized=0, refused=0)
last = None  # the latest launch, for tests that look at what it touched
_current = None
_options = SimpleNamespace(seed=0, select=None, limit=None)


def _load(self, ptrs, mask, other, *policies, **more):
    _current.count(_options.limit)
    element = ptrs.get_element_ty()
    dtype = interpreter._get_np_dtype(element)
    data, keep = ptrs.data, np.asarray(mask.data).astype(bool, copy=False)
    every = bool(keep.all())
    if other is None or every:
        # bf16 travels as bits; the largest unsigned ones are a NaN
        filled = np.full_like(data, 0 if every else garbage(dtype), dtype=dtype)
    else:
        filled = other.data
    addresses = data.ravel() if every else data[keep]
    if not addresses.size:
        return interpreter.TensorHandle(filled.copy(), element)
    region = _current.locate("load", addresses, dtype.itemsize)
    _current.note_load(region, addresses)
    if region.virtual:
        return interpreter.TensorHandle(np.where(keep, dtype.type(0), filled), element)
    real = data - np.uint64(region.shift)
    read = interpreter._interpreter.load(real, keep, filled, dtype)
    return interpreter.TensorHandle(read, element)


def _store(self, ptrs, value, mask, *policies, **more):
    addresses = ptrs.data[np.asarray(mask.data).astype(bool, copy=False)]
    if not addresses.size:
        return
    size = interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize
    region = _current.locate("store", addresses, size)
    _current.note_store(region, addresses)
    if not region.virtual:
        real = ptrs.data - np.uint64(region.shift)
        interpreter._interpreter.store(real, value.data, mask.data)


def _refuse_atomic(kind, *args):
    _current.fail(f"atomic {kind}: the order of its effects is not fixed")


def _set_grid_dim(self, *grid):
    if not _current.grid:
        _current.shuffle(grid, _options.seed)
    self.grid_dim = _current.grid


def _set_grid_idx(self, x, y, z):
    _current.step()
    self.grid_idx = _current.program


def _convert(original, arg):
    made = original(arg)
    if hasattr(arg, "data_ptr"):
        made.handle.data = np.array([_current.address(arg)], dtype=np.uint64)
    return made


def _patch_lang(original, function):
    # a kernel's helpers find the language as the kernel left it: patching again takes longer than
    # most of them run
    langs = {m for m in function.__globals__.values() if m is tl or m is tl.core}
    if langs <= _current.patched:
        return interpreter._LangPatchScope()
    _current.patched |= langs
    return original(function)


def _numpy_dtype(original, kind, known={}):  # noqa: B006
    # the interpreter builds a table of all types for each question
    name = kind.scalar.name
    if name not in known:
        known[name] = original(kind)
    return known[name]


def _named_arguments(executor, args, kwargs):
    known = inspect.signature(executor.fn).parameters
    return inspect.getcallargs(
        executor.fn, *args, **{k: v for k, v in kwargs.items() if k in known}
    )


def _launch(original, self, *args, **kwargs):
    global _current, last  # noqa: PLW0603  the interpreter has one builder, so one launch at a time
    try:
        _current = last = Launch(self.fn.__name__, _named_arguments(self, args, kwargs))
        if _options.select is not None:
            grid = (*self.grid, 1, 1)[:3]
            _current.choose(grid, _options.select(grid))
            self.grid = (len(_current.order),)
        original(self, *args, **kwargs)
        counts.sanitized += _current.ran == len(_current.order)
    except BaseException as error:
        counts.refused += 1
        found = _sanitizer_error(error)
        if found is None:
            raise
        raise found from None
    finally:
        _current = None


def _sanitizer_error(error):
    """The error of ours that the interpreter wrapped, once for each function on the way."""
    while isinstance(error, InterpreterError):
        error = error.__cause__
    return error if isinstance(error, SanitizerError) else None


def _run(original, self, *args, warmup, **kwargs):
    counts.started += not warmup
    return original(self, *args, warmup=warmup, **kwargs)


def _allocate(original, *args, **kwargs):
    made = original(*args, **kwargs)
    # two frames up: past the patched attribute
    if sys._getframe(2).f_globals.get("__package__") == _GUARDED and not made.is_meta:
        made.fill_(garbage(made.dtype))
    return made


def _patch(owner, name, replacement):
    original = getattr(owner, name)

    @functools.wraps(original)
    def patched(*args, **kwargs):
        return replacement(original, *args, **kwargs)

    setattr(owner, name, patched)


def install():
    """Sanitize every interpreted launch of this process from now on."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    if builder.create_masked_load is _load:
        return
    builder.create_masked_load, builder.create_masked_store = _load, _store
    builder.set_grid_dim, builder.set_grid_idx = _set_grid_dim, _set_grid_idx
    for kind in _ATOMICS:
        setattr(builder, f"create_atomic_{kind}", functools.partial(_refuse_atomic, kind))
    # the host copies of CPU tensors are the tensors themselves; those of meta tensors can't be
    executor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
    executor._restore_args_dev = lambda self, *arguments: None
    _patch(executor, "__call__", _launch)
    _patch(interpreter.InterpretedFunction, "run", _run)
    _patch(interpreter, "_implicit_cvt", _convert)
    _patch(interpreter, "_patch_lang", _patch_lang)
    _patch(interpreter, "_get_np_dtype", _numpy_dtype)
    # `torch.device` as a context knows torch's own allocators, if it has looked them up by now
    _device_constructors()
    for owner, name in _ALLOCATORS:
        _patch(owner, name, _allocate)


@contextmanager
def order(seed):
    """Run the programs of each launch in another shuffled order."""
    before, _options.seed = _options.seed, seed
    try:
        yield
    finally:
        _options.seed = before


@contextmanager
def only_programs(select):
    """Run only the programs that `select(grid)` lists."""
    before, _options.select = _options.select, select
    try:
        yield
    finally:
        _options.select = before


@contextmanager
def at_most(loads):
    """Refuse launches that make more loads: a wrong loop may have no end."""
    before, _options.limit = _options.limit, loads
    try:
        yield
    finally:
        _options.limit = before
