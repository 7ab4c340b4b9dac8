"""The last line of a Slurm job's script: put the job back in the queue, or not. Works without a launcher.

The script asks for it, and no rank does: so a job also goes on after a rank was killed.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from medmask import cli, io
from medmask.launch.job import PEER_LOST, Job, checkpoint_step, note, rank_file

CRASHES_IN_PLACE = 3  # after so many without a new checkpoint in between, the next one would be no better
TRIES, PAUSE_SECONDS = 10, 6


def main(argv: Sequence[str] | None = None) -> int:
    """Requeue the job that this runs in if that helps; writes down what was decided, and why."""
    parser = argparse.ArgumentParser("medmask.launch.after")
    parser.add_argument("--code", type=int, required=True, help="exit code of the ranks")
    parser.add_argument("--folder", type=Path, required=True, help="of the job")
    parser.add_argument("--work-dir", type=Path, required=True, help="of the run")
    parser.add_argument("--max-requeues", type=int, required=True)
    args = parser.parse_args(argv)
    job_id = os.environ["SLURM_JOB_ID"]
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    step, code = checkpoint_step(args.work_dir), args.code
    if said_stopped(args.folder, restart):
        code = cli.STOPPED  # of all ranks; Slurm may have ended the slower ones at the exit of the first
    why_not = reason_to_end(code, args.folder, restart, step, args.max_requeues) or is_not_ours(job_id, restart)
    values = {"event": "end", "restart": restart, "code": code, "step": step}
    note(args.folder, **values, requeued=not why_not, why=why_not)  # first: the requeue ends this process too
    if not why_not:
        requeue(job_id)
    return 0


def said_stopped(folder: Path, restart: int) -> bool:
    """Whether the first rank of this start has saved and stopped."""
    path = rank_file(folder, 0)
    report = io.read_json(path) if path.exists() else {}
    return report.get("restart") == restart and report.get("code") == cli.STOPPED


def reason_to_end(code: int, folder: Path, restart: int, step: int, max_requeues: int) -> str:
    """Why a job is not to be requeued; empty if it is."""
    if code == 0:
        return "done"
    if (folder / "cancelled").exists():
        return "told to stop"
    if code not in (cli.STOPPED, PEER_LOST) and code < 128:  # 128 and a signal's number: killed
        return "failed"
    if restart >= max_requeues:
        return f"requeued {restart} times, the most that --max-requeues allows"
    earlier = [line for line in Job("slurm", "", "", str(folder), 0, "", 0).attempts() if line["event"] == "end"]
    crashes = sum(line["step"] == step and line["code"] != cli.STOPPED for line in earlier)
    if code != cli.STOPPED and crashes + 1 >= CRASHES_IN_PLACE:
        return f"ended {CRASHES_IN_PLACE} times without a new checkpoint in between"
    return ""


def is_not_ours(job_id: str, restart: int) -> str:
    """Why Slurm would not have this start of the job requeued: cancelled, or started anew elsewhere."""
    done = subprocess.run(["scontrol", "show", "job", "-o", job_id], capture_output=True, text=True)
    fields = dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)
    state, starts = fields.get("JobState", "RUNNING"), int(fields.get("Restarts", restart))
    if state != "RUNNING":
        return f"Slurm says {state}"
    return f"started anew, {starts} times" if starts != restart else ""


def requeue(job_id: str) -> None:
    for _ in range(TRIES):
        done = subprocess.run(["scontrol", "requeue", job_id], capture_output=True, text=True)
        if done.returncode == 0:
            return
        print(f"medmask.launch.after: {done.stderr.strip()}", file=sys.stderr)
        time.sleep(PAUSE_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
