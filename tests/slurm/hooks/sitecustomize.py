"""On PYTHONPATH of a training of several ranks: slow steps, a record of the images seen, a kill within a checkpoint.

MEDMASK_TEST_PAUSE    seconds that each step sleeps, so that faults have time to happen
MEDMASK_TEST_KILL_AT  step whose checkpoint the first start writes half of, before it kills itself
"""

import importlib.abc
import importlib.util
import io
import os
import signal
import sys
import time

PAUSE = float(os.environ.get("MEDMASK_TEST_PAUSE", "0"))
KILL_AT = os.environ.get("MEDMASK_TEST_KILL_AT")


class Hook(importlib.abc.MetaPathFinder):
    """Changes a module of the package right after its import."""

    def find_spec(self, name, path, target=None):
        change = CHANGES.pop(name, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


def slow(fit):
    step = fit.Run.train_step

    def train_step(run, clock, parts, stop):
        if run.ctx.world == 1:
            return step(run, clock, parts, stop)
        time.sleep(PAUSE)
        return step(run, clock, (noted(run, clock, batch) for batch in parts), stop)

    fit.Run.train_step = train_step


def noted(run, clock, batch):
    with (run.execution.work_dir / f"seen-{run.ctx.rank}.txt").open("a") as file:
        file.write(" ".join(map(str, [clock.step, *batch.positions.tolist()])) + "\n")
    return batch


def deadly(checkpoint):
    import torch

    save = torch.save

    def half(content, path):
        is_first = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
        if is_first and os.environ.get("WORLD_SIZE", "1") > "1" and content["state"]["step"] == int(KILL_AT):
            buffer = io.BytesIO()
            save(content, buffer)
            path.write_bytes(buffer.getvalue()[: buffer.tell() // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        save(content, path)

    torch.save = half


CHANGES = {"medmask.train.fit": slow} if PAUSE else {}
CHANGES |= {"medmask.train.checkpoint": deadly} if KILL_AT else {}
if CHANGES:
    sys.meta_path.insert(0, Hook())
