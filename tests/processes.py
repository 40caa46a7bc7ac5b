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
    """What `worker(rank, world, *args)` returns on each rank, or the exception that ended it."""
    made = context()
    told, port = made.Queue(), free_port()
    processes = [
        made.Process(target=_rank, args=(worker, rank, world, port, timeout, told, args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    found, end = {}, time.monotonic() + PATIENCE
    while len(found) < world and time.monotonic() < end:
        try:
            rank, what = told.get(timeout=0.5)
            found[rank] = pickle.loads(what)
        except queue.Empty:
            gone = [r for r, p in enumerate(processes) if not p.is_alive() and r not in found]
            if gone and told.empty():
                found |= {rank: DiedError(processes[rank].exitcode) for rank in gone}
    for process in processes:
        process.join(10)
        if process.is_alive():
            process.kill()
    return {rank: found.get(rank, DiedError("it hangs")) for rank in range(world)}


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


def _rank(worker, rank, world, port, timeout, told, args):
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(PATIENCE - 20)  # a rank that hangs says where
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    limit = {} if timeout is None else {"timeout": datetime.timedelta(seconds=timeout)}
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world, **limit)
    try:
        result = pickle.dumps(worker(rank, world, *args))  # tensors by value
    except BaseException as error:
        result = pickle.dumps(failure(error))
    told.put((rank, result))
    told.close()
    told.join_thread()  # it is all written
    if timeout is None:
        dist.barrier()  # a group that is left while others still talk may end them
        dist.destroy_process_group()
    os._exit(0)
