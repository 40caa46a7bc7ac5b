"""Running tasks on the threads that torch already has.

torch's CPU operators run on an OpenMP team whose workers keep spinning for milliseconds after each
parallel region. A pool of our own would share the cores with them: measured, a product on two
threads was slower than on one. So tasks run as a parallel region of the very same OpenMP library.
Where that library can't be found, and in a forked child, where its team does not survive, a pool of
Python threads takes over.

Tasks are Python callables that spend their time in code that has released the GIL.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

Task = Callable[[], None]
_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run(tasks: Sequence[Task]) -> None:
    """Run the tasks on at most `torch.get_num_threads()` threads and wait for all.

    Tasks never wait for one another. The first exception is raised after all have ended.
    """
    threads = min(torch.get_num_threads(), len(tasks))
    if threads < 2:
        for task in tasks:
            task()
        return
    library = None if _Pool.forked else _openmp()
    if library is None:
        _Pool.run(tasks, threads)
    else:
        _run_region(library, tasks, threads)


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch has loaded, if it has the GNU entry points."""
    for folder in ("lib", "../torch.libs"):
        for path in sorted((Path(torch.__file__).parent / folder).glob("lib*omp*.so*")):
            try:
                library = ctypes.CDLL(str(path))
                library.GOMP_parallel.restype = None
                library.GOMP_parallel.argtypes = [
                    _REGION,
                    ctypes.c_void_p,
                    ctypes.c_uint,
                    ctypes.c_uint,
                ]
                library.omp_get_thread_num.restype = ctypes.c_int
                library.omp_get_num_threads.restype = ctypes.c_int
            except (OSError, AttributeError):
                continue
            return library
    return None


def _run_region(library: ctypes.CDLL, tasks: Sequence[Task], threads: int) -> None:
    errors: list[BaseException] = []

    def share(_: object) -> None:
        # the team may be smaller than asked for, so its real size decides the shares
        first, team = library.omp_get_thread_num(), library.omp_get_num_threads()
        try:
            for task in tasks[first::team]:
                task()
        except BaseException as error:
            errors.append(error)

    library.GOMP_parallel(_REGION(share), None, threads, 0)
    if errors:
        raise errors[0]


class _Pool:
    """Python threads, for where OpenMP can't serve."""

    forked = False
    lock = threading.Lock()
    executor: ThreadPoolExecutor | None = None
    size = 0

    @classmethod
    def run(cls, tasks: Sequence[Task], threads: int) -> None:
        """Run the tasks, the caller among the threads."""
        pool = cls.of(threads - 1)
        futures = [pool.submit(_each, tasks[i::threads]) for i in range(1, threads)]
        try:
            _each(tasks[::threads])
        finally:
            errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error

    @classmethod
    def of(cls, size: int) -> ThreadPoolExecutor:
        """The process's helpers, at least `size`."""
        with cls.lock:
            if cls.executor is None or cls.size < size:
                cls.executor = ThreadPoolExecutor(size, thread_name_prefix="sparsekern")
                cls.size = size
            return cls.executor

    @classmethod
    def forget(cls) -> None:
        """Threads do not survive a fork, and the lock may have been held by one of them."""
        cls.forked, cls.lock, cls.executor, cls.size = True, threading.Lock(), None, 0


def _each(tasks: Sequence[Task]) -> None:
    for task in tasks:
        task()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Pool.forget)
