"""Faults planted one by one into a copy of the package: each must make its tests fail.

``python tests/planted_faults.py [PART OF A FILE NAME]`` (``make faults``) prints a line per fault and exits with 1 if
one went unnoticed. It takes some twenty seconds a fault. A test of the ordinary suite keeps the list up to date.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]


class Fault(NamedTuple):
    """``old`` → ``new``, once, in a file of ``kepo_core``; one of ``tests`` (files below ``tests``) must notice."""

    what: str
    file: str
    old: str
    new: str
    tests: str


FAULTS = [
    Fault(fault["what"], group["file"], fault["old"], fault["new"], group["tests"])
    for group in yaml.safe_load((ROOT / "tests" / "planted_faults.yaml").read_text(encoding="utf-8"))
    for fault in group["faults"]
]


def noticed(fault: Fault, folder: Path) -> bool:
    """Whether the fault's tests fail on a copy of the package in ``folder`` that has it."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    ignored = shutil.ignore_patterns(".*", "results", "mutants", "*.egg-info", "__pycache__", "build")
    shutil.copytree(ROOT, copy, ignore=ignored, symlinks=True)
    shutil.copytree(ROOT / "results" / "reference", copy / "results" / "reference")
    file = copy / "kepo_core" / fault.file
    file.write_text(file.read_text(encoding="utf-8").replace(fault.old, fault.new, 1), encoding="utf-8")
    words = [f"tests/{word}" if word.endswith(".py") else word for word in shlex.split(fault.tests)]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *words]
    done = subprocess.run(command, cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)}, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # neither passed nor failed: no tests, or a test file that does not load
        raise RuntimeError(f"{fault.tests} could not be run:\n{done.stdout[-2000:]}")
    return done.returncode == 1


def main(part: str = "") -> int:
    """Plant every fault in files whose name contains ``part``; 0 if all were noticed."""
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        for fault in FAULTS:
            if part in fault.file:
                seen = noticed(fault, Path(folder))
                missed += not seen
                print(f"{'noticed' if seen else 'MISSED '}  {fault.file}: {fault.what}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
