# What jobs ask for, from the settings of their artifacts, and where the profile sends them.
import os

from snakemake.exceptions import WorkflowError

from medmask.site import refusal


def site(name):
    """A default resource of the profile, or None."""
    found = (workflow.resource_settings.default_resources or {}).get(name)
    return None if found is None else os.path.expandvars(str(found.raw)).strip("'\"")


def check_site():
    """Stop before the first job where Slurm would take none for the profile's partitions and account."""
    if site("launcher") != "slurm":
        return
    account = site("slurm_account")
    for name in filter(None, dict.fromkeys([site("slurm_partition"), site("gpu_partition")])):
        if reason := refusal(name, account):
            raise WorkflowError(
                f"profile: Slurm takes no job for partition {name}, account {account or '(the default)'}: {reason}; "
                "`python -m medmask doctor` says what there is, `doctor --write` fills it in"
            )


def needed(stage, wc):
    return resources_of(stage, artifact(stage, wc.key).settings)


def needs(stage):
    """Resource functions of a stage; the partition follows from the GPUs that a job asks for."""

    def resource(name):
        return lambda wc: needed(stage, wc)[name]

    def partition(wc):
        return site("gpu_partition") if needed(stage, wc)["gpu"] else site("slurm_partition")

    functions = {name: resource(name) for name in ("gpu", "mem_mb", "runtime", "ranks")}
    return functions | ({"slurm_partition": partition} if site("gpu_partition") else {})


def cores(stage):
    return lambda wc: needed(stage, wc)["threads"]


def launcher_cores(stage):
    """Cores of the machine where the launcher runs: with Slurm it only waits there."""
    return lambda wc: 1 if site("launcher") == "slurm" else needed(stage, wc)["threads"]


def launch_flags(stage):
    """Params function: flags of `medmask.launch`, from the resources of the job.

    Changing `ranks` (--set-resources pretrain_ddp:ranks=4) changes what they ask for together; a total that is itself
    set is taken as it is.
    """

    def flags(wc, resources):
        planned, cluster = needed(stage, wc), resources.get("launcher", "local")

        def total(name):
            value = resources.get(name)
            return value * resources.ranks // planned["ranks"] if value == planned[name] else value

        values = {
            "cluster": cluster,
            "ranks": resources.ranks,
            "gpus": total("gpu"),
            "cpus-per-rank": resources.get("cpus_per_task", planned["threads"] // planned["ranks"]),
            "mem-mb": total("mem_mb"),
            "minutes": None if cluster == "local" else resources.runtime,
            "nodes": resources.get("nodes", 1),
            "partition": resources.get("slurm_partition"),
            "account": resources.get("slurm_account"),
        }
        return " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in values.items() if value is not None)

    return flags
