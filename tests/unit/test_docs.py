"""Every fenced block of README and docs/ is run, or parsed, or says what it needs; a test's name says which.

- A command in a block that begins with ``# needs: …`` wants that (GPUs, a cluster, a network). What of it is ours is
  parsed all the same.
- Every other command is parsed: its arguments by the parser of the command itself, its parameters by the package, and
  its files exist. The cheap ones are run as well, the ones about runs in ``make test-all``.
- Python is run, YAML read as the parameters or the study that it is. ``examples/own_data.md`` is run from end to end by
  ``tests/notebooks/test_own_data.py``, README's library example by ``tests/unit/test_task.py``, and the scripts of
  ``examples/`` by ``tests/unit/test_examples.py``.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from test_readme import PAGES, ROOT, name_of

from kepo_core import paths
from kepo_core.arguments import parser
from kepo_core.cli import main, method_overrides, parse_value
from kepo_core.errors import ParamError
from kepo_core.params import Params
from kepo_core.params_io import tagged_cell
from kepo_core.study.studies import read_study


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str

    @property
    def needs(self) -> str:
        """What the block says it needs; empty: nothing."""
        found = re.match(r"# needs: (.+)", self.text)
        return found[1] if found else ""

    @property
    def commands(self) -> list[list[str]]:
        """Its commands as lists of words, without comments; a quoted text may take several lines."""
        found, begun = [], ""
        for line in re.sub(r"\\\n\s*", "", self.text).splitlines():
            begun += line + "\n"
            try:
                words = shlex.split(begun, comments=True)
            except ValueError:  # the closing quote is on a later line
                continue
            begun = ""
            found += [words] if words else []
        assert not begun, f"{self.page}:{self.line} has an open quote"
        return found


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^```(\S*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text[: match.start()].count("\n") + 1
        found.append(Block(name_of(page), line, match[1], match[2]))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
#: Directives of Sphinx, which its build checks, and data.
OTHERS = ("{include}", "{toctree}", "{eval-rst}", "csv")


def test_every_block_has_a_language_by_which_it_is_checked() -> None:
    known = ("bash", "python", "yaml", "text", *OTHERS)
    assert len(BLOCKS) > 50
    assert not [f"{b.page}:{b.line}" for b in BLOCKS if b.language not in known]
    assert {b.page for b in BLOCKS if b.language == "text"} == {"docs/reference/layout.md"}


# Commands ---------------------------------------------------------------------------------------------------------

COMMANDS = [(block, command) for block in BLOCKS if block.language == "bash" for command in block.commands]
#: The parameter file that a reader of examples/own_data.md writes.
WRITTEN = ("data/shapes/run.yaml",)
OURS = ("kepo", "papermill", "python", "make", "source")


def inline_commands() -> list[tuple[Block, list[str]]]:
    """Commands in the text, in single backticks; a command's bare name is no command."""
    found = []
    for page in (page for page in PAGES if page.name != "CHANGELOG.md"):  # which names what is gone as well
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"(?<!`)`((?:kepo|papermill|make|python) [^`]+)`(?!`)", text):
            if not re.fullmatch(r"kepo [a-z-]+( run| check| show| compare)?|kepo .*--help", code):
                found.append((Block(name_of(page), 0, "bash", code), shlex.split(code)))
    return found


def check_kepo(command: list[str]) -> None:
    """By the command's own parser, and what it would check of parameters and files before it does anything."""
    arguments = parser("").parse_args(command)
    file = getattr(arguments, "file", None)
    for path in filter(None, (file, getattr(arguments, "cluster", None))):
        assert (ROOT / path).is_file() or path in WRITTEN, path
    if arguments.command == "study":
        read_study(ROOT / arguments.file)
    if arguments.command not in ("run", "plan", "check-teacher", "runs") or file in WRITTEN:
        return
    cell = tagged_cell(ROOT / (getattr(arguments, "notebook", None) or "notebooks/03_train_kepo.ipynb"))
    values = {name: parse_value(value) for name, value in arguments.parameter if name != "NAME"}
    if arguments.command == "run" and arguments.method not in (None, "NAME"):
        values = method_overrides(arguments.method, Params.load(file, cell=cell), values)
    Params.load(file, values, cell=cell)


def check_papermill(command: list[str]) -> None:
    """The notebook and the file exist, and the parameters are its cell's or the package's."""
    notebook, _, *options = command
    cell = tagged_cell(ROOT / notebook)
    while options:
        option = options.pop(0)
        assert option in ("-f", "-p"), option
        name = options.pop(0)
        if option == "-f":
            assert (ROOT / name).is_file(), name
        else:
            assert name in cell or name in Params.__dataclass_fields__, name
            options.pop(0)


def check_make(command: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in command:
        variable, _, value = word.partition("=")
        if value:
            assert re.search(rf"^{variable} \?= ", makefile, re.MULTILINE), word
        else:
            assert re.search(rf"^{word}:", makefile, re.MULTILINE), word


def check(block: Block, words: list[str]) -> None:
    """Parse one command; fails if it is not ours and its block does not say what it needs."""
    while "=" in words[0]:  # environment variables
        words = words[1:]
    program, rest = words[0], words[1:]
    if program not in OURS:
        assert block.needs, f"{program} is not ours: begin the block with `# needs: …`"
        return
    if program == "kepo" and "…" not in rest:
        check_kepo(rest)
    elif program == "papermill":
        check_papermill(rest)
    elif program == "python":
        compile((ROOT / rest[0]).read_text(encoding="utf-8"), rest[0], "exec")
    elif program == "make":
        check_make(rest)
    elif program == "source":
        assert rest == [".venv/bin/activate"] or block.needs


def label(case: tuple[Block, list[str]]) -> str:
    block, words = case
    return f"{block.page}{': needs ' + block.needs if block.needs else ''}: {' '.join(words).split(chr(10))[0]}"


@pytest.mark.parametrize("case", [*COMMANDS, *inline_commands()], ids=label)
def test_a_command_is_parsed_or_says_what_it_needs(case: tuple[Block, list[str]]) -> None:
    check(*case)


@pytest.mark.parametrize(
    "line", ["kepo rum", "kepo run -p tua 0", "kepo run -m grop", "make trian", "papermill notebooks/09.ipynb o -p x 1",
             "papermill notebooks/03_train_kepo.ipynb o -p tua 0", "python examples/no.py", "vllm serve MODEL"],
)  # fmt: skip
def test_a_command_that_would_fail_is_noticed(line: str) -> None:
    with pytest.raises((AssertionError, SystemExit, OSError, ParamError)):
        check(Block("page", 1, "bash", line), line.split())


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project without runs, and in it the ten rows of examples/own_data.md."""
    for name in ("params", "notebooks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "kepo_core").mkdir()
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "kepo_core/paths.py"))
    monkeypatch.setenv("KEPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in BLOCKS if block.page == "examples/own_data.md"]
    code, table = (next(block.text for block in blocks if block.language == kind) for kind in ("python", "csv"))
    exec(code, {})
    (tmp_path / "data/shapes/questions.csv").write_text(table, encoding="utf-8")
    return tmp_path


#: The commands that need no run, and take a second or two.
CHEAP = {
    " ".join(words): words
    for block, words in COMMANDS
    if words[0] == "kepo" and words[1] in ("params", "plan", "data", "runs") and not block.needs
    if not {"show", "compare"} & set(words)
}
PRINTED = {"params": "tau: 1.0", "plan": "GiB on each GPU", "data": "10", "runs": "no runs in"}


@pytest.mark.parametrize("words", CHEAP.values(), ids=list(CHEAP))
def test_a_cheap_command_runs(words: list[str], project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes = (0, 1) if words[1] == "plan" else (0,)  # 1: it does not fit
    assert main([word.replace("FOLDER", "data/shapes") for word in words[1:]]) in codes
    assert PRINTED[words[1]] in capsys.readouterr().out


@pytest.mark.slow
def test_the_commands_about_runs_run(tmp_path: Path) -> None:
    """In a copy of the project, over two runs of the tutorial, with the smallest of parameter files under them."""
    for name in ("kepo_core", "notebooks", "params"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    typed = [words for block, words in COMMANDS if not block.needs]

    def run(words: list[str]) -> None:
        command = [sys.executable, "-m", "kepo_core.cli", *words[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout[-1000:]}{done.stderr[-3000:]}"

    for words in (["kepo", "run", "-p", "tau", "0"], ["kepo", "run", "-m", "grpo"]):
        assert words in typed
        run([*words, "-f", "params/smoke.yaml"])
    first, second = sorted(path.name for path in (tmp_path / "results").glob("2*"))
    names = {"RUN": first, "HASH": first[-8:], "OTHER": second[-8:]}
    about = {" ".join(words): words for words in typed if words[0] == "kepo" and set(words) & names.keys()}
    for line in sorted(set(about) - {"kepo resume RUN"}):  # both runs have completed
        run([names.get(word, word) for word in about[line]])
    run(["kepo", "report"])
    assert (tmp_path / "results/index.html").is_file() and (tmp_path / "results" / first / "export/README.md").is_file()


# Python and YAML ----------------------------------------------------------------------------------------------------

#: Where the Python of these pages is run.
ELSEWHERE = ("README.md", "examples/own_data.md")


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=lambda b: f"{b.page}: {b.needs}")
def test_python_runs_or_says_what_it_needs(block: Block) -> None:
    code = compile(block.text, f"{block.page}:{block.line}", "exec")
    if block.page not in ELSEWHERE and not block.needs:
        exec(code, {})


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=lambda b: f"{b.page}:{b.line}")
def test_yaml_is_read_as_what_it_is(block: Block, tmp_path: Path) -> None:
    (file := tmp_path / "file.yaml").write_text(block.text, encoding="utf-8")
    if "methods:" in block.text:
        assert read_study(file).runs
    else:
        Params.load(str(file))
