"""One finished run of the tiny config, which the tests of this folder look at."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "fixtures" / "config_tiny.yaml"


class Workflow:
    """Calls snakemake on a folder of its own, and refuses all network calls of Snakemake and of the jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = [str(Path(__file__).with_name("offline")), os.environ.get("PYTHONPATH", "")]
        self.environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def __call__(self, *arguments, config=None, configfile=TINY, timeout=500) -> subprocess.CompletedProcess:
        if config is not None:
            configfile = self.folder / "changed.yaml"
            configfile.write_text(yaml.safe_dump(config, sort_keys=False))
        command = [
            sys.executable,
            "-m",
            "snakemake",
            "--snakefile",
            str(ROOT / "Snakefile"),
            "--directory",
            str(self.folder),
        ]
        command += ["--profile", str(ROOT / "profiles" / "local"), "--cores", "2"]
        command += ["--configfile", str(configfile)] if configfile else []
        return subprocess.run(
            [*command, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=ROOT,
            env=self.environ,
            check=False,
        )

    def jobs(self, config, *arguments) -> dict[str, int]:
        """Jobs of a dry run by rule, without `all`."""
        done = self("-n", *arguments, config=config)
        assert done.returncode == 0, done.stdout + done.stderr
        return job_stats(done.stdout + done.stderr)


def job_stats(text: str) -> dict[str, int]:
    if "Job stats:" not in text:
        assert "Nothing to be done" in text
        return {}
    table = text.split("Job stats:", 1)[1].splitlines()[3:]
    rows = [line.split() for line in table[: table.index(next(line for line in table if line.startswith("total")))]]
    return {name: int(count) for name, count in rows if name != "all"}


def tiny():
    return yaml.safe_load(TINY.read_text())


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder in which the tiny config has run to its report."""
    workflow = Workflow(tmp_path_factory.mktemp("tiny"))
    done = workflow()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    workflow.output = done.stdout + done.stderr
    return workflow
