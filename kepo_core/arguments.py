"""The arguments of the command ``kepo``."""

import argparse

#: The values of `run.Run.state`, and "unreadable" for folders that cannot be read.
_STATES = ("running", "completed", "failed", "interrupted", "killed", "unreadable")


def parser(description: str) -> argparse.ArgumentParser:
    """The parser of the whole command: ``command`` is the subcommand, the other attributes are its arguments."""
    found = argparse.ArgumentParser(prog="kepo", description=description)
    commands = found.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute a notebook into a new run folder")
    run.add_argument("notebook", nargs="?", help="a notebook that makes a run (default: notebooks/03_train_kepo.ipynb)")
    teacher = commands.add_parser("check-teacher", help="try a served teacher as a run does; exit code 1 if it fails")
    plan = commands.add_parser("plan", help="memory of a run on each GPU, and what to change if it does not fit")
    plan.add_argument("file", help="parameter file")
    plan.add_argument("--gpu", default="80GB", metavar="SIZE", help="memory of one GPU, e.g. 80GB or 79.6GiB")
    plan.add_argument("--gpus", type=int, metavar="N", help="number of GPUs, one process each (default: FILE's)")
    plan.add_argument("--prompt-tokens", type=int, metavar="N", help="tokens of a prompt without its picture")
    for command in (run, teacher):
        command.add_argument("-f", "--file", metavar="PARAMS_FILE",
                             help="parameter file (default: every default, as in params/phantom.yaml)")  # fmt: skip
    for command in (run, teacher, plan):
        command.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                             help="set one parameter, over the file's value; repeatable")  # fmt: skip
    run.add_argument("-m", "--method", metavar="NAME", help="a row of the table of methods (docs/reference/methods.md)")
    resume = commands.add_parser("resume", help="resume a run that was interrupted, failed or killed")
    resume.add_argument("run", help="a folder's name, its beginning, its end (the parameters' hash), or its path")
    data = commands.add_parser("data", help="look at data").add_subparsers(dest="data_command", required=True)
    check = data.add_parser("check", help="show what a data set holds, and what was mended or dropped")
    check.add_argument(
        "path", help="OmniMedVQA's folder or zip, Med-R1's question files, a table's folder, or hf:OWNER/NAME"
    )
    check.add_argument("-f", "--file", metavar="PARAMS_FILE", help="check as a run with these parameters does")
    check.add_argument("--quick", action="store_true", help="neither decode pictures nor try the processor")
    check.add_argument("--strict", action="store_true", help="stop at the first row that would be dropped")
    check.add_argument("--columns", default="", metavar="NAMES", help="like the parameter data_columns")
    check.add_argument("--html", metavar="FILE", help="also write the tables as a page")
    study = commands.add_parser("study", help="many runs").add_subparsers(dest="study_command", required=True)
    many = study.add_parser("run", help="make the runs of a study file; completed ones are skipped")
    many.add_argument("file", help="a file such as params/study-small.yaml")
    many.add_argument("--slots", type=int, default=0, help="runs at a time (default: one per GPU, or per core)")
    many.add_argument("--cluster", metavar="FILE", help="submit the runs to a cluster, as in params/slurm.yaml")
    report = commands.add_parser("report", help="write a page of runs, studies or notebooks, or the index of runs")
    report.add_argument("what", nargs="*", help="runs (as for resume), study files, executed notebooks")
    report.add_argument(
        "--index", metavar="RESULTS", nargs="?", const="", help="write the index of this folder (default: results)"
    )
    hub = commands.add_parser("export", help="write a run's model with its card for the Hugging Face Hub")
    hub.add_argument("run", help="as for resume")
    hub.add_argument("folder", nargs="?", help="a new folder (default: export, in the run's folder)")
    _add_runs(commands.add_parser("runs", help="list the runs of a results folder, show or compare them"))
    listing = commands.add_parser("params", help="print every parameter with its meaning, as a parameter file")
    listing.add_argument("-f", "--file", metavar="PARAMS_FILE", help="show this file's values")
    return found


def _add_runs(runs: argparse.ArgumentParser) -> None:
    runs.set_defaults(action="list", results=None, state=None, method=None, parameter=[], json=False)
    actions = runs.add_subparsers(dest="action")
    listed = actions.add_parser("list", help="a row per run, the newest first; the default of `kepo runs`")
    listed.add_argument("--state", choices=_STATES, help="only runs in this state; killed: its process is gone")
    listed.add_argument("--method", metavar="NAME", help="only runs of this method, as in the folder's name")
    listed.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                       help="only runs with this value of a parameter; repeatable")  # fmt: skip
    listed.add_argument("--json", action="store_true", help="as JSON, with accuracies in [0, 1]")
    show = actions.add_parser("show", help="show a run's results, its inputs, and how to repeat it")
    show.add_argument("run", help="as for resume")
    compare = actions.add_parser("compare", help="compare parameters of runs, and accuracies with the first run's")
    compare.add_argument("run", nargs="+", help="as for resume")
    for action in (listed, show, compare):
        action.add_argument("--results", metavar="DIR", help="folder of the runs (default: results)")
