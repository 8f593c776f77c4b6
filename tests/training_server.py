"""Trains in forked children, so that a test can kill many without paying for each start.

Reads one job a line, as JSON; answers with the child's process id, then with its exit status.
A job holds ``run_dir``, ``options`` of :func:`temi.train`, and perhaps ``die``: a moment of the
checkpoint's writing, and the how-manieth checkpoint, at which the child kills itself.
"""

import json
import os
import signal
import sys

import boltons.fileutils
import torch
import torch.utils.tensorboard  # here once, not in each child
from sklearn.datasets import make_blobs

import temi
from temi import checkpoints
from temi.training import train

X, _ = make_blobs(240, 8, centers=4, random_state=0)
SETTINGS = dict(num_clusters=4, num_heads=3, batch_size=60, num_neighbors=5)
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports what children would


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def plan_death(moment: str, number: int) -> None:
    """Kill this process at a moment of writing the ``number``-th checkpoint."""
    save, rename, write, link = (
        checkpoints.save,
        boltons.fileutils.atomic_rename,
        checkpoints._HashingFile.write,
        checkpoints.link,
    )
    saved = []

    def counting_save(path, *content):
        saved.append(path)
        save(path, *content)

    def dying_write(self, block):
        if moment == "write" and len(saved) == number and len(block) > 1000:
            self.file.write(bytes(block)[:500])
            self.file.flush()
            die()
        return write(self, block)

    def dying_rename(source, target, *rest, **options):
        here = target.endswith(checkpoints.LATEST) and len(saved) == number
        if here and moment == "before rename":
            die()
        rename(source, target, *rest, **options)
        if here and moment == "after rename":
            die()

    def dying_link(source, target):
        if moment == "link" and len(saved) == number and target.name == checkpoints.BEST:
            die()
        link(source, target)

    checkpoints.save = counting_save
    checkpoints._HashingFile.write = dying_write
    checkpoints.link = dying_link
    boltons.fileutils.atomic_rename = dying_rename


def child(job: dict) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if "die" in job:
        plan_death(*job["die"])
    config = temi.TrainConfig(**SETTINGS, epochs=job["epochs"])
    train(X, config, run_dir=job["run_dir"], progress=False, **job["options"])


if __name__ == "__main__":
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
            os._exit(0)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)
