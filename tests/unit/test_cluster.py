"""Runs on a cluster: submitit's own processes, and a Slurm of five small scripts that keeps what it is given."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from kepo_core.cli import REFUSED, main
from kepo_core.errors import ParamError
from kepo_core.exit_codes import COMPLETED, INTERRUPTED
from kepo_core.params import Params
from kepo_core.runs import provenance, shelf
from kepo_core.runs.run import Run
from kepo_core.study import cluster, jobs
from kepo_core.study.cluster import Cluster
from kepo_core.study.progress_table import row

ROOT = Path(__file__).parents[2]
DATA = {"train_items": 2}
LOCAL = "cluster: local\nslots: 2\ntimeout_min: 5\n"
SLURM = "cluster: slurm\nslots: 3\ntimeout_min: 90\ngpus_per_node: 2\ncpus_per_task: 6\nslurm_partition: gpu\n"

# It stands in for notebook 03: it waits for a file, and leaves a completed run.
STUB = """
import os, time
from kepo_core.params import Params
from kepo_core.runs.run import Run
run = Run.for_notebook(Params.from_notebook(globals()))
run.remember(data={data})
assert run.params.seed != 1, "this seed is unlucky"
(run.path / "metrics.jsonl").write_text('{{"step": 1, "epoch": 0.5}}\\n')
while not os.path.exists("go"):
    time.sleep(0.05)
run.finish({{"threads": os.environ["OMP_NUM_THREADS"]}})
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of its own: parameters, the notebook above, results; its jobs import this package."""
    for folder in ("params", "notebooks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "params/phantom.yaml").write_text("seed: 0\n")
    cell = new_code_cell(STUB.format(data=DATA))
    nbformat.write(new_notebook(cells=[cell]), tmp_path / jobs.NOTEBOOK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def described(project: Path, text: str) -> Cluster:
    (project / "cluster.yaml").write_text(text)
    made = Cluster("cluster.yaml", "results")
    made.pause = 0.1
    return made


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands: jobs start at once, in the background; what was submitted and cancelled is kept in a folder."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    scripts = {
        "sbatch": 'cp "$1" {0}/script.sh; id=77$(ls {0} | wc -l)\n'
        'SLURM_JOB_ID=$id setsid bash "$1" > /dev/null 2>&1 < /dev/null &\n'
        'echo $! > {0}/$id.pid; echo "Submitted batch job $id"',
        "srun": "while [ $# -gt 0 ]; do case $1 in --output) log=${{2//%j/$SLURM_JOB_ID}}; shift 2;; --*) shift;;\n"
        '*) break;; esac; done; exec "$@" > ${{log//%t/0}} 2>&1',
        "sacct": 'echo "JobID|State|NodeList"; while [ $# -gt 0 ]; do if [ "$1" = -j ]; then\n'
        'kill -0 -- -$(cat {0}/$2.pid) 2> /dev/null && state=RUNNING || state=FAILED; echo "$2|$state|node1"\n'
        "fi; shift; done",
        "scancel": "echo $1 >> {0}/cancelled; kill -TERM -- -$(cat {0}/$1.pid)",
    }
    for name, text in scripts.items():
        path = folder / name
        path.write_text("#!/bin/bash\n" + text.format(folder) + "\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


# What a file may hold ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (LOCAL.replace("local", "pbs"), "cluster in cluster.yaml is 'pbs', expected slurm or local"),
        (LOCAL.replace("slots: 2", ""), "slots in cluster.yaml is None, expected a whole number of at least 1"),
        (LOCAL.replace("slots: 2", "slots: 0"), "slots in cluster.yaml is 0, expected a whole number of at least 1"),
        (LOCAL.replace("timeout_min: 5", ""), "timeout_min in cluster.yaml is None, expected a whole number"),
        (
            LOCAL.replace("min: 5", "min: 1h"),
            "timeout_min in cluster.yaml is '1h', expected a whole number of at least 1",
        ),
        (LOCAL + "hours: 3", "submitit refuses cluster.yaml: Parameter 'hours' need to be prefixed"),
        (LOCAL + "slurm_partitoin: gpu", "submitit refuses cluster.yaml: .*'partitoin'"),
        (LOCAL + "mem_gb: much", 'submitit refuses cluster.yaml: Parameter "mem_gb" expected type'),
        (LOCAL + "nodes: 2", "submitit refuses cluster.yaml: LocalExecutor can use only one node"),
        (SLURM, r"cluster in cluster.yaml is slurm, but Slurm's commands \(srun\) are not found here"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    project: Path, text: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(project))
    with pytest.raises(ParamError, match=sentence) as error:
        described(project, text)
    assert "\n" not in str(error.value)


def test_the_command_refuses_it_before_anything_runs(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = str(ROOT / "params/study-small.yaml")
    assert main(["study", "run", study, "--cluster", "gone.yaml"]) == REFUSED
    assert "gone.yaml cannot be read" in capsys.readouterr().err and not (project / "results").exists()


def test_the_file_that_comes_with_the_package_fits(slurm: Path) -> None:
    assert Cluster(str(ROOT / "params/slurm.yaml"), str(slurm)).count == 8
    assert Cluster(str(ROOT / "params/slurm.yaml"), str(slurm), slots=3).count == 3


# submitit's own processes -----------------------------------------------------------------------------------------


def test_jobs_run_to_their_end_and_say_why_they_failed(project: Path) -> None:
    (project / "go").touch()
    good = Params.load()
    bad = good.replace(seed=1)
    seen = set()

    def show(all_jobs: Sequence[jobs.Job]) -> None:
        seen.update(row(job)[2] for job in all_jobs)

    runs, failures = jobs.run_all(
        {"good": good, "bad": bad}, DATA, described(project, LOCAL + "cpus_per_task: 3"), show
    )
    assert runs["good"].status["state"] == "completed" and runs["good"].headline == {"threads": "3"}
    assert "AssertionError: this seed is unlucky" in failures["bad"]
    assert "step 1/2" in seen
    logs = list(jobs.jobs_dir("results").glob("*/*_0_log.out"))
    assert len(logs) == 2 and any("completed, everything about it is in" in log.read_text() for log in logs)


# Slurm ------------------------------------------------------------------------------------------------------------


def test_slurm_is_asked_for_what_the_file_says(project: Path, slurm: Path) -> None:
    (project / "go").touch()
    runs, failures = jobs.run_all({"one": Params.load()}, DATA, described(project, SLURM))
    assert not failures and runs["one"].headline == {"threads": "6"}
    asked = set((slurm / "script.sh").read_text().splitlines())
    assert asked > {f"#SBATCH --{line}" for line in ("partition=gpu", "gpus-per-node=2", "cpus-per-task=6", "time=90",
                                                     "job-name=kepo", "signal=USR2@90")}  # fmt: skip


@pytest.mark.slow
def test_an_interrupted_study_cancels_its_jobs_and_goes_on_with_them(project: Path, slurm: Path) -> None:
    params = Params.load()

    def show(all_jobs: Sequence[jobs.Job]) -> None:
        if row(all_jobs[0])[2] == "step 1/2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jobs.run_all({"one": params}, DATA, described(project, SLURM), show)
    (folder,) = (path for path in (project / "results").iterdir() if path.name.endswith(params.hash))
    assert Run.open(folder).status["state"] == "interrupted"
    assert len((slurm / "cancelled").read_text().split()) == 1
    (project / "go").touch()
    runs, failures = jobs.run_all({"one": params}, DATA, described(project, SLURM))
    assert not failures and runs["one"].path == folder


def test_what_slurm_refuses_is_said_with_its_words(project: Path, slurm: Path) -> None:
    (slurm / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid partition specified: gpu' >&2; exit 1\n")
    _, failures = jobs.run_all({"one": Params.load()}, DATA, described(project, SLURM))
    assert failures["one"] == "the cluster refused the job: sbatch: error: invalid partition specified: gpu"


def test_a_job_that_ends_without_a_word_has_failed(project: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_LATE", 0.0)
    (slurm / "srun").write_text("#!/bin/bash\nexit 1\n")
    _, failures = jobs.run_all({"one": Params.load()}, DATA, described(project, SLURM))
    assert re.fullmatch(r"its job 77\d+ ended without a result \(FAILED\), see .*_0_log.out", failures["one"])


# On the node ------------------------------------------------------------------------------------------------------

NODE = """
import sys
from kepo_core.params import Params
from kepo_core.runs import shelf
from kepo_core.study import cluster, jobs
from pathlib import Path
sys.executable = sys.argv[1]
print("begins", flush=True)
sys.exit(cluster.work(Params.load(), shelf.origin(Path(jobs.NOTEBOOK), {data}), 1))
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_whatever_ends_a_job_interrupts_its_run(project: Path, sent: signal.Signals) -> None:
    kepo = project / "kepo"
    kepo.write_text(
        "#!/bin/bash\ntrap 'echo \"kepo: stopped\"; exit 130' TERM; kill -USR2 $$ && echo 'USR2 is ignored'\n"
        "for i in $(seq 100); do sleep 0.1; done\n"
    )
    kepo.chmod(kepo.stat().st_mode | stat.S_IXUSR)
    command = [sys.executable, "-c", NODE.format(data=DATA), str(kepo)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=hears_interrupts) as node:
        assert node.stdout is not None
        lines = [node.stdout.readline(), node.stdout.readline()]
        node.send_signal(sent)
        rest = node.communicate(timeout=20)[0]
    assert lines == ["begins\n", "USR2 is ignored\n"] and node.returncode == INTERRUPTED
    assert rest == "kepo: stopped\nkepo: the cluster stopped the run; the same command resumes it\n"
    assert jobs.reason(node.returncode, rest).startswith("the cluster stopped the run")


def hears_interrupts() -> None:  # a job in the background inherits that SIGINT is ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("state", ["completed", "running"])
def test_what_others_did_while_it_waited_is_left_to_them(
    project: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    origin = shelf.origin(project / jobs.NOTEBOOK, DATA)
    theirs = Run.allocate(Params.load(), owner="kepo run")
    theirs.remember(data=DATA, notebook_sha256=provenance.notebook_digest(project / jobs.NOTEBOOK))
    if state == "completed":
        theirs.conclude("completed")
    monkeypatch.setattr(jobs, "command", lambda *_: pytest.fail("it was run again"))
    assert cluster.work(Params.load(), origin, 1) == COMPLETED
    assert json.loads((theirs.path / "status.json").read_text())["state"] == state
