"""Running tasks on the threads that torch already has.

torch's CPU operators run on an OpenMP team whose workers keep spinning for milliseconds after each
parallel region. A pool of our own would share the cores with them: measured, a product on two
threads was slower than on one. So tasks run as a parallel region of the very same OpenMP library.
Where that library can't be found, a pool of Python threads takes over.

A team does not survive a fork: in the child the next region, torch's own too, would wait for ever
for threads that are not there. So the team of the thread that forks is ended before, and parent and
child each start a new one when they need it.

Tasks are Python callables that spend their time in code that has released the GIL.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from sparsekern.errors import IncompleteError

Task = Callable[[], None]
_REGION = ctypes.CFUNCTYPE(None, ctypes.py_object)
_NAMES = ("libgomp", "libomp", "libiomp")
_PAUSE_HARD = 2  # omp_pause_hard: give the threads back


def run(tasks: Sequence[Task]) -> None:
    """Run the tasks on at most `torch.get_num_threads()` threads and wait for all.

    Tasks never wait for one another. After the first exception no other task is begun; it is raised
    after those that run have ended.

    Raises:
        IncompleteError: a task was not run though nothing was raised.
    """
    threads = min(torch.get_num_threads(), len(tasks))
    if threads < 2:
        for task in tasks:
            task()
        return
    job = _Job(tasks)
    library = None if _Pool.forked else _openmp()
    if library is None:
        _Pool.run(job, threads)
    else:
        _run_region(library, job, threads)
    job.check()


class _Job:
    """The tasks of one call, which its threads take one after the other."""

    __slots__ = ("count", "done", "errors", "left")

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.left: Iterator[Task] = iter(tasks)  # under the GIL, each goes to one thread
        self.count = len(tasks)
        self.done: list[None] = []
        self.errors: list[BaseException] = []

    def work(self) -> None:
        """Run what is left; keep what is raised for `check`, and drop the rest then."""
        try:
            for task in self.left:
                task()
                self.done.append(None)
        except BaseException as error:
            self.errors.append(error)
            for _ in self.left:
                pass

    def check(self) -> None:
        """Raise what a thread raised, or `IncompleteError` if a task did not come to its end."""
        if self.errors:
            raise self.errors[0]
        if len(self.done) != self.count:
            raise IncompleteError(
                f"{self.count} parts of a product must run on torch's threads; "
                f"{len(self.done)} did: its result is not complete"
            )


# ---- OpenMP


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch has loaded, if it has the GNU entry points."""
    home = Path(torch.__file__).parent
    for folder in (home / "lib", home.parent / "torch.libs"):
        for path in sorted(folder.glob("lib*omp*.so*")):
            if not path.name.startswith(_NAMES):
                continue  # "compiler" has "omp" in it too
            try:
                library = ctypes.CDLL(str(path))
                library.GOMP_parallel.restype = None
                library.GOMP_parallel.argtypes = [
                    _REGION,
                    ctypes.py_object,
                    ctypes.c_uint,
                    ctypes.c_uint,
                ]
            except (OSError, AttributeError):
                continue
            return library
    return None


def _share(job: _Job) -> None:
    """What each thread of a team does."""
    job.work()


_SHARE = _REGION(_share)  # one for all calls: making one costs 10 us


def _run_region(library: Any, job: _Job, threads: int) -> None:
    """Run a job as a parallel region.

    A signal handler may raise before the first line of `_share`, where no `try` reaches. ctypes
    hands that to `sys.unraisablehook` and goes on; only the main thread runs signal handlers.
    """
    own = threading.get_ident()
    if own != threading.main_thread().ident:
        library.GOMP_parallel(_SHARE, job, threads, 0)
        return
    hook = sys.unraisablehook

    def keep(lost: sys.UnraisableHookArgs) -> None:
        ours = threading.get_ident() == own and "ctypes callback" in (lost.err_msg or "")
        if ours and lost.exc_value is not None:
            job.errors.append(lost.exc_value)
        else:
            hook(lost)

    sys.unraisablehook = keep
    try:
        library.GOMP_parallel(_SHARE, job, threads, 0)
    finally:
        sys.unraisablehook = hook


# ---- without OpenMP


class _Pool:
    """Python threads, for where OpenMP can't serve."""

    forked = False  # with a team whose threads are not there
    lock = threading.Lock()
    executor: ThreadPoolExecutor | None = None
    size = 0

    @classmethod
    def run(cls, job: _Job, threads: int) -> None:
        """Run the job, the caller among the threads."""
        pool = cls.of(threads - 1)
        futures: list[Future[None]] = []
        try:
            futures += [pool.submit(job.work) for _ in range(1, threads)]
            job.work()
        finally:
            _wait(futures, job)

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
        cls.lock, cls.executor, cls.size = threading.Lock(), None, 0


def _wait(futures: Sequence[Future[None]], job: _Job) -> None:
    """Wait for helpers, also through an interrupt: they write into the caller's memory."""
    for future in futures:
        while not future.done():
            try:
                future.exception()
            except BaseException as error:
                job.errors.append(error)


# ---- fork


class _Fork:
    """What a child must know of its parent."""

    clean = True  # whether the thread that forked had no team left

    @classmethod
    def before(cls) -> None:
        """End this thread's team, the only one that the child would take for its own."""
        cls.clean = cls.end_team()

    @classmethod
    def in_child(cls) -> None:
        """Forget the parent's threads."""
        _Pool.forked = _Pool.forked or not cls.clean
        _Pool.forget()
        # torch joins threads that only the parent has; a new one may have taken a dead one's place
        atexit.register(cls.end_team)

    @classmethod
    def end_team(cls) -> bool:
        """Give back the threads of this thread's team; whether that went well."""
        library = None if _Pool.forked else _openmp()
        # LLVM's library looks after itself at a fork
        pause = getattr(library, "omp_pause_resource_all", None)
        return pause is not None and "gomp" in str(library) and pause(_PAUSE_HARD) == 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_Fork.before, after_in_child=_Fork.in_child)
