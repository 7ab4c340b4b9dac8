"""`snakemake --lint`: fails on any finding but those on conda and containers, since one locked environment runs all."""

import re
import subprocess
import sys
from pathlib import Path

EXPECTED = "Specify a conda environment or container for each rule."


def main() -> int:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "snakemake", "--lint", "--snakefile", str(root / "Snakefile")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    text = done.stdout + done.stderr
    findings = re.findall(r"^ +\* (.+):$", text, re.MULTILINE)
    unexpected = [finding for finding in findings if finding != EXPECTED]
    if unexpected or not findings:
        print(text)
    print(f"snakemake --lint: {len(unexpected)} findings, {len(findings) - len(unexpected)} on conda and containers")
    return bool(unexpected) or not findings


if __name__ == "__main__":
    sys.exit(main())
