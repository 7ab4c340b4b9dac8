"""What each process of a job runs."""

import logging
import os
import signal
import sys
import traceback
from pathlib import Path

import submitit

from medmask import cli, io
from medmask.launch.job import PEER_LOST, note, rank_file
from medmask.train.signals import STOP_AT

DEVICES = "MEDMASK_CUDA_VISIBLE_DEVICES"  # what the launcher sees: submitit's local executor hides all GPUs
FIRST_PORT, PORTS = 12000, 20000  # below those that systems give to outgoing connections


def run_rank(command: list[str], finished: str) -> int:
    """Run the stage as one rank of the job; returns its exit code, to Slurm as that of the process.

    When all ranks have saved and stopped, only the first one says so: Slurm ends a job at the first bad exit, and the
    first rank may still be writing.
    """
    logging.getLogger("submitit").setLevel(logging.WARNING)
    tell_early()
    place = submitit.JobEnvironment()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch is not loaded yet: see `wrap` in train.fit
    rank, is_slurm = place.global_rank, place.cluster == "slurm"
    folder = Path(os.environ["SUBMITIT_FOLDER"])
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    report = {"pid": os.getpid(), "restart": restart, "code": None}
    io.write_json(rank_file(folder, rank), report)
    if rank == 0:
        note(folder, event="start", restart=restart, nodes=list(place.hostnames))
    export(place, restart)
    is_done = Path(finished).exists() or (folder / "done").exists()  # requeued after its end
    code = 0 if is_done else run_stage(command)
    if io.read_json(rank_file(folder, rank))["restart"] == restart:  # and no later start has begun elsewhere
        io.write_json(rank_file(folder, rank), {**report, "code": code})
    if not is_slurm:
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(0 if code == cli.STOPPED and rank > 0 else code)


def tell_early() -> None:
    """Replace submitit's handlers, which save and requeue by themselves; keep a signal until the stage has its own."""

    def keep(number: int, frame: object) -> None:
        os.environ[STOP_AT] = "0"

    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, keep)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)


def export(place: submitit.JobEnvironment, restart: int) -> None:
    """Set the variables that torch reads; Slurm's choice of GPUs is left as it is."""
    os.environ.update(
        RANK=str(place.global_rank),
        LOCAL_RANK=str(place.local_rank),
        WORLD_SIZE=str(place.num_tasks),
        LOCAL_WORLD_SIZE=str(place.num_tasks // place.num_nodes),
    )
    if place.cluster == "slurm":
        os.environ.update(MASTER_ADDR=place.hostnames[0], MASTER_PORT=str(port_of(int(place.raw_job_id), restart)))
        return
    if (devices := os.environ.pop(DEVICES, None)) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    else:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)


def port_of(job_id: int, restart: int) -> int:
    """The port at which the ranks of a start meet: known to all without a word, and another one after a requeue.

    Ranks of an earlier start may still run on a node that Slurm has lost sight of; they shall meet nobody.
    """
    return FIRST_PORT + (job_id * 32 + restart % 32) % PORTS


def run_stage(command: list[str]) -> int:
    try:
        return cli.main(command)
    except Exception as error:
        traceback.print_exc()
        return PEER_LOST if is_peer_lost(error) else 1


def is_peer_lost(error: Exception) -> bool:
    """Whether an error is that of a connection to another rank."""
    import torch.distributed as dist

    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "closed by peer" in text or "reset by peer" in text
