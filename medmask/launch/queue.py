"""What Slurm says of a job."""

import logging
import time

from medmask.launch.job import Job, Options, Unreachable, checkpoint_step
from medmask.site import call

log = logging.getLogger(__name__)
LIVE = frozenset({
    "PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING",
    "SIGNALING", "STAGE_OUT", "SPECIAL_EXIT", "RESV_DEL_HOLD", "POWER_UP_NODE", "COMPLETING",
})  # fmt: skip
GONE = "GONE"  # Slurm knows nothing of the job
MOST_GONE = 5  # so often in a row a job is not found before it is given up: a new one takes a while to appear
SILENT_SECONDS = 3600  # how long Slurm may not answer
CROSS_CHECK = 10  # accounting may lag behind for ever: ask the controller too, now and then
ENDS = {
    "COMPLETED": "ended without its outputs",
    "PREEMPTED": "was preempted by another job and not put back in the queue",
    "NODE_FAIL": "ended because a node failed, and was not put back in the queue",
    "BOOT_FAIL": "ended because a node did not start",
    "TIMEOUT": "reached its time limit of {minutes:g} minutes before it could save and requeue",
    "DEADLINE": "could not end before the deadline that the site set for it",
    "OUT_OF_MEMORY": "needed more memory than the {mem} asked for",
    "CANCELLED": "was cancelled",
    "FAILED": "failed",
    GONE: "is not known to Slurm any more, and has left no outputs",
    "ENDED": "ended without its outputs",
}
ADVICE = {
    "TIMEOUT": "raise `needs: hours`, or let it save more often",
    "OUT_OF_MEMORY": "raise `needs: mem_gb`, or lower `workers`",
    "DEADLINE": "ask for a shorter time limit",
}


class Queue:
    """Asks Slurm for the state of a job: accounting first, then the controller."""

    def __init__(self) -> None:
        self.asked = self.gone = 0
        self.silent_since: float | None = None
        self.last = "PENDING"

    def state(self, job_id: str) -> str:
        """State of a job; GONE when it was not found several times, the last state while Slurm does not answer."""
        self.asked += 1
        booked = accounting_state(job_id)
        if booked in LIVE and self.asked % CROSS_CHECK:
            return self.found(booked)
        queued, error = controller_state(job_id)
        if queued and (queued in LIVE or booked not in ENDS):
            return self.found(queued)
        if booked in ENDS and not error:  # and the controller does not have it in the queue: no requeue is on its way
            return self.found(booked)
        if error:
            return self.silence(error)
        self.gone += 1
        return GONE if self.gone >= MOST_GONE else self.last

    def found(self, state: str) -> str:
        if self.silent_since is not None:
            log.info("Slurm answers again")
        self.gone, self.silent_since, self.last = 0, None, state
        return state

    def silence(self, error: str) -> str:
        now = time.monotonic()
        if self.silent_since is None:
            self.silent_since = now
            log.warning("Slurm does not answer: %s; asking again, for up to %d minutes", error, SILENT_SECONDS // 60)
        if now - self.silent_since > SILENT_SECONDS:
            raise Unreachable(f"Slurm has not answered for {SILENT_SECONDS // 60} minutes: {error}; the job may go on")
        return self.last


def accounting_state(job_id: str) -> str:
    """Last state of a job in the accounting; empty when there is none, or it does not answer."""
    done = call("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job_id}", "--format=State")
    lines = done.text.split("\n") if done.is_ok else []
    return lines[-1].split()[0].rstrip("+") if lines and lines[-1] else ""


def controller_state(job_id: str) -> tuple[str, str]:
    """State of a job, empty if the controller has forgotten it; and what is wrong when it does not answer."""
    done = call("squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T")
    if not done.is_ok and "invalid job id" not in done.text.lower():
        return "", done.text
    return (done.text.split() or [""])[0] if done.is_ok else "", ""


def ending(job: Job, state: str, options: Options) -> str:
    """One sentence: what happened to a job, where the log is, what to do."""
    mem = "memory" if options.mem_mb is None else f"{options.mem_mb} MB"
    what = ENDS.get(state, f"ended in the state {state}").format(minutes=options.minutes or 0, mem=mem)
    last = next((line for line in reversed(job.attempts()) if line["event"] == "end"), None)
    if last and state in ("FAILED", "COMPLETED") and last["why"] not in ("", "failed", "done"):
        what += f": {last['why']}"
    step = checkpoint_step(options.work_dir)
    again = f"the same command goes on from step {step}" if step else "the same command starts it again"
    advice = f"{ADVICE[state]}; {again}" if state in ADVICE else again
    return f"job {job.job_id} {what}; log: {job.log_of(0)}; {advice}"
