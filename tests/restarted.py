"""A run under torchrun: `restarted.py FOLDER` saves after each step, and dies once in an update."""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_distributed import Run

from sparsekern.methods import change

KILLED_AT = 4  # batch of RigL's second update


def kill_once(folder):
    """Die in the middle of writing an update, the first time."""
    mark = folder / "died"
    if dist.get_rank() != 1 or mark.exists():
        return

    def dying(writes):
        mark.touch()
        writes.reverse()  # as `commit` does: the first come last
        for write in (writes.pop(), writes.pop()):
            write.write()
        os.kill(os.getpid(), signal.SIGKILL)

    change.commit = dying


def main(folder, dies):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    run, path, start = Run(), folder / "saved.pt", 0
    if path.exists():
        saved = torch.load(path)
        run.model.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
        start = saved["batch"]
    for i in range(start, 9):
        if i == KILLED_AT and dies:
            kill_once(folder)
        run.step(i, rank, world)
        if rank == 0:
            state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
            torch.save(state | {"batch": i + 1}, folder / "new.pt")
            (folder / "new.pt").replace(path)
        dist.barrier()
    if rank == 0:
        torch.save(run.result(), folder / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "dies")
