"""Several ranks on this machine: processes that are forked from one that has imported torch."""

import datetime
import faulthandler
import os
import pickle
import queue
import socket
import time
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = float(
    os.environ.get("PATIENCE", "240")
)  # seconds; a rank that waits longer waits forever


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def context():
    """A server that imports once and forks each rank: a start costs next to nothing."""
    made = mp.get_context("forkserver")
    made.set_forkserver_preload(["torch", "torch.distributed.fsdp", "sparsekern"])
    return made


def ranks(worker, world, *args, timeout=None):
    """What `worker(rank, world, *args)` returns on each rank, or the exception that ended it.

    The processes are kept for the next call with as many, unless one has failed: what a worker
    leaves behind, such as patches or another process group, is there then. With a `timeout`, in
    seconds, of the process group they are their own.
    """
    team = _teams.pop(world, None) if timeout is None else None
    if team is None or not all(process.is_alive() for process in team.processes):
        team = Team(world, timeout)
    found = team.run(worker, args)
    if timeout is None and not any(isinstance(one, Exception) for one in found.values()):
        _teams[world] = team
    else:
        team.end()
    return found


_teams = {}


class Team:
    """Processes with a process group among them, that do one piece of work after the other."""

    def __init__(self, world, timeout):
        made, port = context(), free_port()
        self.told, self.orders = made.Queue(), [made.SimpleQueue() for _ in range(world)]
        self.processes = [
            made.Process(
                target=_rank, args=(rank, world, port, timeout, self.told, order), daemon=True
            )
            for rank, order in enumerate(self.orders)
        ]
        for process in self.processes:
            process.start()

    def run(self, worker, args):
        """What it gives on each rank, or the exception that ended it."""
        for order in self.orders:
            order.put((worker, args))
        world, found, end = len(self.processes), {}, time.monotonic() + PATIENCE
        while len(found) < world and time.monotonic() < end:
            try:
                rank, what = self.told.get(timeout=0.5)
                found[rank] = pickle.loads(what)
            except queue.Empty:
                lost = [r for r in range(world) if r not in found]
                gone = [r for r in lost if not self.processes[r].is_alive()]
                if gone and self.told.empty():
                    found |= {rank: DiedError(self.processes[rank].exitcode) for rank in gone}
        return {rank: found.get(rank, DiedError("it hangs")) for rank in range(world)}

    def end(self):
        """Let no process go on."""
        for process in self.processes:
            process.kill()
            process.join()


class DiedError(Exception):
    """A rank ended without a word; its exit status, negative for a signal."""

    @property
    def status(self):
        return self.args[0]


class FailedError(Exception):
    """What a rank raised: its type's name, its text with notes, and the traceback."""

    kind, text, trace = (property(lambda self, i=i: self.args[i]) for i in range(3))

    def __str__(self):
        return f"{self.kind}: {self.text}\n{self.trace}"


def failure(error):
    """An exception as plain data."""
    text = "\n".join((str(error), *getattr(error, "__notes__", ())))
    trace = "".join(traceback.format_exception(error))
    return FailedError(type(error).__name__, text, trace)


def values(found):
    """The results by rank, of ranks that all came to an end."""
    for one in found.values():
        if isinstance(one, Exception):
            raise one
    return [found[rank] for rank in sorted(found)]


def _rank(rank, world, port, timeout, told, orders):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    limit = {} if timeout is None else {"timeout": datetime.timedelta(seconds=timeout)}
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world, **limit)
    while True:
        worker, args = orders.get()
        faulthandler.dump_traceback_later(PATIENCE - 20)  # a rank that hangs says where
        try:
            result = pickle.dumps(worker(rank, world, *args))  # tensors by value
        except BaseException as error:
            result = pickle.dumps(failure(error))
        faulthandler.cancel_dump_traceback_later()
        told.put((rank, result))
