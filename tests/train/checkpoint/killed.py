"""A run that is killed again and again while it writes checkpoints.

    python -m tests.train.checkpoint.killed FOLDER KILLS SEED

Each time a child resumes from the newest checkpoint of FOLDER, trains, begins a checkpoint after
every step, and is killed (SIGKILL) at a random moment. It tells which checkpoints were finished.
After each kill the newest checkpoint must be whole, and no older than the last one that was told
to be finished; and every step's loss must be what it was the first time. The last line of the
output is JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time

import torch

from raypar.train.checkpoint import CheckpointStore
from raypar.train.config import CheckpointConfig
from raypar.train.state import TrainState
from tests.train.checkpoint.runs import graph_of, losses, plan_of, start

NAME = "mlp"


def child(folder: str, plan_seed: int, out: int) -> None:
    """Trains until it is killed."""

    def tell(what: str, *values: object) -> None:
        os.write(out, (json.dumps([what, *values]) + "\n").encode())

    plan = plan_of(NAME, plan_seed, sharded=False)
    store = CheckpointStore(folder, CheckpointConfig(num_to_keep=2))
    with start(NAME, plan) as run:
        found = store.latest()
        step = 0 if found is None else found.restore(run).step
        tell("ready")
        while True:
            [loss] = losses(run, step, 1)
            tell("loss", step, loss.hex())
            step += 1
            store.begin(run, TrainState(step=step), plan)
            for checkpoint in store.poll():
                tell("saved", checkpoint.step)


def main(folder: str, kills: int, seed: int) -> dict[str, int]:
    """Kills, and counts what was wrong afterwards."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    graph_of(NAME)  # once, for all children
    counts = {"kills": 0, "broken": 0, "lost": 0, "other_losses": 0, "steps": 0, "leftovers": 0}
    known: dict[int, str] = {}
    newest = 0
    while counts["kills"] < kills:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(read)
                child(folder, 3, write)
            finally:
                os._exit(1)
        os.close(write)
        with os.fdopen(read) as lines:
            assert json.loads(lines.readline()) == ["ready"], "the child could not resume"
            # By steps first: on a busy machine, seconds alone would kill all before their first.
            told = [json.loads(lines.readline()) for _ in range(draw.randrange(4))]
            time.sleep(draw.uniform(0.0, 0.1))
            os.kill(pid, signal.SIGKILL)
            told += [json.loads(line) for line in lines if line.endswith("\n")]
        os.waitpid(pid, 0)
        counts["kills"] += 1
        for what, step, *value in told:
            if what == "saved":
                newest = max(newest, step)
            elif known.setdefault(step, value[0]) != value[0]:
                counts["other_losses"] += 1
        latest = CheckpointStore(folder).latest()
        counts["lost"] += newest > (latest.step if latest else 0)
        counts["broken"] += bool(latest and latest.verify())
        counts["leftovers"] += any(name.startswith(".") for name in os.listdir(folder))
    counts["steps"] = len(known)
    return counts


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
