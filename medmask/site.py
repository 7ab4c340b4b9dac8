"""A Slurm site: what its commands answer, and the profile that describes it. Imports no torch."""

import getpass
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmask import io
from medmask.config.load import read_yaml
from medmask.errors import ConfigError

ANSWER_SECONDS = 30
NO_ACCOUNT = ("(null)", "N/A", "n/a", "none")


@dataclass(frozen=True)
class Answer:
    """What a command said: its output, or when it failed the last line of its complaint."""

    is_ok: bool
    text: str


@dataclass(frozen=True)
class Partition:
    """What `sinfo` says of one; minutes is None without a time limit, gpus those of its best node."""

    name: str
    is_default: bool
    is_up: bool
    minutes: int | None
    gpus: int


@dataclass(frozen=True)
class Profile:
    """A profile: its options, and the resources in it, of all rules and of single ones."""

    path: Path
    options: dict[str, Any]
    default: dict[str, Any]
    rules: dict[str, dict[str, Any]]

    @property
    def account(self) -> str | None:
        return self.default.get("slurm_account")

    def partition_of(self, rule: str, gpus: int) -> str | None:
        """Where the jobs of a rule go: what is set for it, then what its GPUs call for."""
        usual = self.default.get("slurm_partition")
        return self.rules.get(rule, {}).get(
            "slurm_partition", self.default.get("gpu_partition", usual) if gpus else usual
        )


def call(*command: str) -> Answer:
    try:
        # in a session of its own: Ctrl-C is for who asks alone
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, start_new_session=True)
    except FileNotFoundError:
        return Answer(False, f"{command[0]}: not on this machine")
    except OSError as error:
        return Answer(False, f"{command[0]}: {error.strerror}")
    except subprocess.TimeoutExpired:
        return Answer(False, f"{command[0]}: no answer in {ANSWER_SECONDS} s")
    if done.returncode == 0:
        return Answer(True, done.stdout.strip())
    complaint = done.stderr.strip() or done.stdout.strip() or f"{command[0]}: exit code {done.returncode}"
    return Answer(False, complaint.splitlines()[-1])


def read_partitions(text: str) -> dict[str, Partition]:
    """Partitions by name, from `sinfo --noheader --format=%P|%a|%l|%G`, where one may have several lines."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        marked, is_up, limit, gres = line.split("|")
        name = marked.rstrip("*")
        gpus = max(gpu_count(gres), found[name].gpus if name in found else 0)
        found[name] = Partition(name, marked.endswith("*"), is_up == "up", to_minutes(limit), gpus)
    return found


def gpu_count(gres: str) -> int:
    """GPUs in a text like `gpu:a100:8(S:0-1),shard:4`."""
    return sum(int(number) for number in re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)", gres))


def to_minutes(limit: str) -> int | None:
    """Minutes in Slurm's [D-]HH:MM:SS or MM:SS; None for no limit."""
    if not re.fullmatch(r"(\d+-)?[\d:]+", limit):
        return None
    days, _, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    hours, minutes, _ = [0] * (3 - len(parts)) + parts
    return int(days or 0) * 24 * 60 + hours * 60 + minutes


def min_job_age() -> int | None:
    """Seconds that squeue knows of a job after its end."""
    found = re.search(r"MinJobAge\s*=\s*(\d+)", call("scontrol", "show", "config").text)
    return int(found[1]) if found else None


def user_accounts() -> list[str]:
    """Accounts that this user may charge, the usual one first; none where the site keeps no accounts."""
    user = getpass.getuser()
    answers = (
        call("sacctmgr", "-nP", "show", "user", user, "format=defaultaccount"),
        call("sacctmgr", "-nP", "show", "associations", f"user={user}", "format=account"),
    )
    names = [name for answer in answers if answer.is_ok for name in answer.text.split()]
    return [name for name in dict.fromkeys(names) if name not in NO_ACCOUNT]


def refusal(partition: str | None, account: str | None) -> str:
    """Why Slurm would take no job for these, empty if it would; nothing is submitted."""
    flags = [f"--partition={partition}"] if partition else []
    flags += [f"--account={account}"] if account else []
    answer = call("sbatch", "--test-only", *flags, "--wrap=true")
    return "" if answer.is_ok else answer.text.removeprefix("sbatch: error: ").removeprefix("allocation failure: ")


def read_profile(path: Path) -> Profile:
    """ConfigError when it cannot be read."""
    content = read_yaml(path, "`option: value`")
    default = content.get("default-resources") or []
    if isinstance(default, list):
        default = dict(str(entry).split("=", 1) for entry in default)
    rules = content.get("set-resources") or {}
    if not isinstance(rules, dict):
        raise ConfigError(f"--profile: {path}: set-resources: need `rule: {{name: value}}`, got {type(rules).__name__}")
    return Profile(path, content, unquoted(default), {rule: unquoted(given or {}) for rule, given in rules.items()})


def unquoted(resources: dict[str, Any]) -> dict[str, Any]:
    return {name: value.strip("'\"") if isinstance(value, str) else value for name, value in resources.items()}


def write_profile(path: Path, partitions: dict[str, Partition]) -> str:
    """Put what the site answers into a profile, and leave the rest of it as it is.

    That is the default partition, one with GPUs, and the user's account. Returns what was written; ConfigError when the
    profile has no line for one of them.
    """
    up = [part for part in partitions.values() if part.is_up] or list(partitions.values())
    cpu = min(up, key=lambda part: (not part.is_default, part.gpus > 0))
    gpu = max(up, key=lambda part: (part.gpus > 0, part.name != cpu.name, part.gpus))
    accounts = user_accounts()
    values = {
        "- slurm_partition=": f"'{cpu.name}'",
        "- gpu_partition=": f"'{gpu.name}'",
        "- slurm_account=": f"'{accounts[0]}'" if accounts else None,
    }
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--profile: cannot read {path}: {error.strerror}") from error
    for name, value in values.items():
        line = re.compile(rf"^( *)(?:# ?)?({name})('[^'\n]*'|\S+)", re.MULTILINE)
        if len(line.findall(text)) != 1:
            raise ConfigError(
                f"--profile: {path}: need one line `{name}...`, as in the shipped profile; write it by hand"
            )
        text = line.sub(rf"\g<1>\g<2>{value}" if value else r"\g<1># \g<2>\g<3>", text)
    with io.atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")
    return ", ".join(f"{name.strip('- :=')} {value}" for name, value in values.items() if value)
