"""`kepo runs`: runs are found by name and by what they are, shown, and compared."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from kepo_core.analysis.answers import to_table
from kepo_core.cli import main
from kepo_core.data.records import Answer, AnswerOutcome
from kepo_core.errors import ParamError
from kepo_core.params import PLACES, Params
from kepo_core.params_io import short_hash
from kepo_core.runs import listing
from kepo_core.runs.run import Run

ROOT = Path(__file__).parents[2]
HEADLINE = {"MRI before": 0.25, "MRI after": 0.75, "Avg. before": 0.5, "Avg. after": 0.625}


@pytest.fixture
def params(tmp_path: Path) -> Params:
    return Params.load(ROOT / "params/smoke.yaml", {"results_dir": str(tmp_path / "results")})


@pytest.fixture
def kepo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`kepo runs …` over the test's results: exit code, and what it said."""

    def kepo(*arguments: str) -> tuple[int, str]:
        code = main(["runs", *arguments, "--results", str(tmp_path / "results")])
        said = capsys.readouterr()
        return code, said.out + said.err

    return kepo


def answer(question: int, correct: bool, modality: str = "MRI") -> Answer:
    outcome = AnswerOutcome.CORRECT if correct else AnswerOutcome.WRONG
    return Answer(f"q{question}", modality, "", "", outcome, "A", correct, True, 5, True)


def leave(params: Params, right: int = 6, state: str = "completed", test: str = "the test set") -> Run:
    """A run folder as notebook 03 and `kepo run` leave it: 8 questions, of which ``right`` were answered rightly."""
    run = Run.allocate(params, owner="kepo run")
    run.remember(notebook="notebooks/03_train_kepo.ipynb", data={"test_sha256": test})
    items = [f"eval,MRI,q{question},Images/{question // 2}.png" for question in range(8)]
    (run.path / "items.csv").write_text("\n".join(["part,modality,id,image", *items]) + "\n")
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3')
    for name in ("notebook.ipynb", "report.html", "training/checkpoint-2/x"):
        (run.path / name).parent.mkdir(exist_ok=True, parents=True)
        (run.path / name).write_text("words")
    given = [answer(question, question < right) for question in range(8)]
    run.write_table("predictions", to_table({"untrained": [answer(q, False) for q in range(8)], "kepo": given}))
    run.finish(HEADLINE)
    run.conclude(state, "" if state == "completed" else "out of luck")  # type: ignore[arg-type]
    return run


def kill(run: Run) -> None:
    """The status of a run whose process is gone: nobody holds its lock."""
    run._write_status("running", owner="kepo run", pid=1, started="2026-01-01T00:00:00Z")


# Found and listed ------------------------------------------------------------------------------------------------


def test_a_run_is_found_by_name_part_and_path_and_by_nothing_else(params: Params, tmp_path: Path) -> None:
    results = tmp_path / "results"
    one, again, other = leave(params), leave(params), leave(params.replace(tau=0.0))
    (results / "nothing-of-a-run").mkdir()
    for name in (other.path.name, other.params.hash, str(other.path)):
        assert listing.find(name, results) == other.path
    assert listing.find(one.path.name, results) == one.path  # its name is the beginning of the next one's
    with pytest.raises(ParamError, match=re.escape(f"several runs: {one.path.name}, {again.path.name}: write more")):
        listing.find(params.hash, results)
    for name in ("", "nothing-like-it", "nothing-of-a-run", "params"):
        with pytest.raises(ParamError, match=r"no run is called .* expected the name, .*, for example 20"):
            listing.find(name, results)
    with pytest.raises(ParamError, match="which has none"):
        listing.find("x", tmp_path / "nowhere")


def test_the_list_has_a_row_per_run_and_its_filters_combine(
    params: Params, tmp_path: Path, kepo: Callable[..., tuple[int, str]]
) -> None:
    done, failed = leave(params), leave(params.replace(seed=1, learning_rate=1e-3), state="failed")
    kill(killed := leave(params.replace(seed=1, distill=False, explore=False)))
    (torn := leave(params.replace(seed=2))).path.joinpath("status.json").write_text('{"state": "comp')
    (tmp_path / "results" / "reference").mkdir()
    code, said = kepo("list")
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines()[1:5]}
    assert code == 0 and len(rows) == 4
    assert " ".join(rows[done.path.name]).startswith("completed 0 2 25.0 → 75.0 % 50.0 → 62.5 %")
    assert rows[failed.path.name][0] == "failed" and f"{failed.path.name}: out of luck" in said
    assert rows[killed.path.name][0] == "killed" and f"kepo resume {killed.path}" in said
    assert rows[torn.path.name][0] == "unreadable" and "status.json cannot be read: Unterminated string" in said

    def ids(*arguments: str) -> set[str]:
        return {found["id"] for found in json.loads(kepo("list", "--json", *arguments)[1])}

    assert ids() == {run.path.name for run in (done, failed, killed, torn)}
    assert ids("--state", "killed") == {killed.path.name}
    assert ids("-p", "seed", "1") == {failed.path.name, killed.path.name, torn.path.name}  # who knows
    assert ids("-p", "seed", "1", "-p", "learning_rate", "0.001", "--state", "failed") == {failed.path.name}
    assert ids("--method", "grpo", "--state", "killed") == {killed.path.name}
    assert ids("--method", "grpo", "--state", "completed") == set()
    assert kepo("list", "-p", "seeed", "1") == (2, "kepo: seeed is not a parameter; the nearest is seed\n")
    assert kepo("list", "-p", "tau", "x") == (2, "kepo: tau must be a number, got 'x'\n")


def test_the_newest_comes_first_and_runs_without_arguments_lists(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, started in ((0, "2026-01-02"), (1, "2026-01-03"), (2, "2026-01-01")):
        leave(params.replace(seed=seed))._write_status(
            "failed", owner="kepo run", pid=1, started=f"{started}T00:00:00Z"
        )
    assert [found.seed for found in listing.overview(tmp_path / "results")] == [1, 0, 2]
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "params").mkdir()
    (tmp_path / "params/phantom.yaml").touch()  # a project
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 0 and capsys.readouterr().out.count("failed") == 3


def test_what_a_model_or_an_error_says_cannot_steer_the_terminal(
    params: Params, kepo: Callable[..., tuple[int, str]]
) -> None:
    run = leave(params, state="failed")
    run.fail("\x1b[2Jgone")
    for said in (kepo("list")[1], kepo("show", run.path.name)[1]):
        assert "�[2Jgone" in said and "\x1b" not in said


# Shown and compared ----------------------------------------------------------------------------------------------


def test_show_says_what_came_of_a_run_and_how_to_repeat_it(
    params: Params, kepo: Callable[..., tuple[int, str]]
) -> None:
    run = leave(params.replace(tau=0.5))
    code, said = kepo("show", run.params.hash)
    assert code == 0
    for words in ("state     completed", "nothing, it has completed", "tau                 0.5 (default 1.0)",
                  "data test_sha256", "MRI after    0.75", "predictions.parquet"):  # fmt: skip
        assert words in said, words
    assert shlex.join(["kepo", "run", "notebooks/03_train_kepo.ipynb", *run.params.to_arguments()]) in said
    kill(run)
    assert f"kepo resume {run.path}" in kepo("show", run.params.hash)[1]


def test_compare_says_what_differs_and_pairs_the_answers_of_equal_questions(
    params: Params, kepo: Callable[..., tuple[int, str]]
) -> None:
    first, second = leave(params, right=2), leave(params.replace(tau=0.0), right=6)
    other = leave(params.replace(data_seed=1), right=6, test="pictures of another seed under the same names")
    stopped = leave(params.replace(seed=9), state="interrupted")
    code, said = kepo("compare", *(run.path.name for run in (first, second, other, stopped)))
    assert code == 0
    assert re.search(r"^tau +1\.0 +0\.0 +1\.0 +1\.0$", said, re.MULTILINE) and "learning_rate" not in said
    assert re.search(r"^MRI +25\.0 \[\S+ \S+\] +75\.0 \[\S+ \S+\]$", said, re.MULTILINE)
    assert re.search(r"^Avg\. +\+50\.0 \[\S+ \S+\]$", said, re.MULTILINE) and "gained" in said
    assert "[3] has other questions than [1]" in said and "[4] has no accuracies to compare: it is inter" in said
    assert "picture is not known" not in said
    (first.path / "items.csv").unlink()
    assert "it is unknown which questions share a picture" in kepo("compare", first.path.name, second.path.name)[1]
    assert kepo("compare", first.path.name)[0] == 2


# Broken ----------------------------------------------------------------------------------------------------------


def edit_a_parameter(run: Run) -> None:
    path = run.path / "params.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 5"))


def test_a_package_with_new_parameters_edits_nothing(params: Params) -> None:
    run = Run.allocate(params, owner="kepo run")
    earlier = {name: value for name, value in params.to_dict().items() if name != "guidance"}
    lines = (run.path / "params.yaml").read_text().splitlines(keepends=True)
    (run.path / "params.yaml").write_text("".join(line for line in lines if not line.startswith("guidance:")))
    assert not run.is_edited  # the parameter that is missing has its default
    hashed = short_hash({name: value for name, value in earlier.items() if name not in PLACES})
    run.remember(params_hash=hashed)
    assert not run.is_edited and hashed != params.hash
    edit_a_parameter(run)
    assert run.is_edited


@pytest.mark.parametrize("name", ["status.json", "params.yaml", "provenance.json", "headline.json", "metrics.jsonl",
                                  "predictions.parquet", "items.csv"])  # fmt: skip
def test_no_garbage_is_a_traceback(params: Params, kepo: Callable[..., tuple[int, str]], name: str) -> None:
    run = leave(params)
    for garbage in (b"", b"[]", b"null", b'"', b"\xff\xfe\x00", b'{"state": "completed", "pid": "x"}\n'):
        (run.path / name).write_bytes(garbage)
        assert kepo("list")[0] == 0
        assert kepo("show", run.path.name)[0] in (0, 2)
        assert kepo("compare", run.path.name, run.path.name)[0] in (0, 2)


def test_a_notebook_whose_cell_cannot_be_read_is_named_and_its_run_stays_resumable(
    params: Params, kepo: Callable[..., tuple[int, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = tmp_path / "n.ipynb"
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": "tau = other"}
    notebook.write_text(json.dumps({"cells": [cell]}))
    run = leave(params, state="interrupted")
    run.remember(notebook=str(notebook))
    code, said = kepo("show", run.path.name)
    assert code == 0 and "no command: the parameters cell of n.ipynb does more than set names" in said
    assert main(["resume", str(run.path)]) == 2
    assert "the parameters cell of n.ipynb" in capsys.readouterr().err and Run.open(run.path).state == "interrupted"
