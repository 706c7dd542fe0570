"""Write what the package declares into the pages: parameters, commands, methods and metrics.

``python docs/tables.py`` rewrites the text between a page's markers, ``<!-- declared: NAME -->`` and ``<!-- end -->``.
`make docs` calls it, and a test holds the pages to it, so that a page reads the same here, on GitHub and on the site.
"""

import argparse
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from kepo_core import params_trl
from kepo_core.arguments import parser
from kepo_core.experiment.methods import methods
from kepo_core.method.options import MethodOptions, Range, declared, kind_of
from kepo_core.method.rollouts import GLOSSARY
from kepo_core.params import DataParams, EvaluationParams, ModelParams, Params, RunParams, TaskParams, TrainingParams
from kepo_core.task.multiple_choice import GLOSSARY as TASK_GLOSSARY

PAGES = Path(__file__).parent
_BLOCK = re.compile(r"(<!-- declared: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_KINDS = {bool: "True, False", int: "whole number", float: "number", str: "text"}


def _row(*cells: str) -> str:
    """A row of a table. ``|`` and ``*`` are characters of the cells, except inside of code."""
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _allowed(owner: type, name: str) -> str:
    kind, allowed = kind_of(owner, name)
    if choices := declared(owner)[name].metadata.get("choices"):
        return ", ".join(f"`{choice}`" for choice in choices)
    return _KINDS[kind] + (_range(allowed) if allowed else "")


def _range(allowed: Range) -> str:
    if allowed.high != float("inf"):
        return f", {allowed.low:g} to {allowed.high:g}"
    return f", above {allowed.low:g}" if allowed.above else f", {allowed.low:g} or more"


def parameters() -> Iterator[str]:
    """Every parameter of a run: name, values, default, meaning; a section for each class that declares some."""
    sections = (DataParams, ModelParams, TaskParams, MethodOptions, TrainingParams, EvaluationParams, RunParams)
    if {name for section in sections for name in declared(section)} != set(declared(Params)):
        raise RuntimeError("a class of parameters has no section in docs/tables.py")
    for section in sections:
        yield f"## {(section.__doc__ or '').splitlines()[0].rstrip('.')}"
        yield ""
        yield _row("parameter", "default", "values", "what it does")
        yield "|---|---|---|---|"
        for name, field in declared(section).items():
            default = f"`{field.default}`" if field.default != "" else "empty"
            yield _row(f"`{name}`", default, _allowed(section, name), field.metadata["help"])
        yield ""


def trl() -> Iterator[str]:
    """TRL's fields whose default is another one here, and those that parameters of a run set."""
    yield _row("field", "default here")
    yield "|---|---|"
    for name, default in params_trl.DEFAULTS.items():
        yield _row(f"`{name}`", f"`{default}`")
    yield ""
    yield "These are set by a parameter of their own, or by the run, and are refused:"
    yield ""
    yield _row("field", "use")
    yield "|---|---|"
    for name, instead in params_trl.SET_BY.items():
        yield _row(f"`{name}`", f"`{instead}`" if instead else "set by the run")


def _commands(found: argparse.ArgumentParser, help: str) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """Every command that does something: its name, what it does, its parser."""
    for action in found._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, child in action.choices.items():
                yield from _commands(child, helps[name])
            return
    yield found.prog, help, found


def _argument(action: argparse.Action) -> str:
    metavar = action.metavar or (action.dest if not action.option_strings else action.dest.upper())
    value = " ".join(metavar) if isinstance(metavar, tuple) else metavar
    if not action.option_strings:
        return {"?": f"[{value}]", "*": f"[{value} …]", "+": f"{value} …"}.get(str(action.nargs), value)
    if action.nargs == 0:
        value = ""
    elif action.nargs == "?":
        value = f"[{value}]"
    return ", ".join(f"{option} {value}".strip() for option in action.option_strings)


def commands() -> Iterator[str]:
    """Every command of ``kepo``, with its arguments."""
    for name, help, found in _commands(parser(""), ""):
        arguments = [action for action in found._actions if not isinstance(action, argparse._HelpAction)]
        yield f"## {name}"
        yield ""
        yield f"{help[0].upper()}{help[1:]}."
        yield ""
        if arguments:
            yield _row("argument", "what it is")
            yield "|---|---|"
        for action in arguments:
            choices = f"; one of {', '.join(map(str, action.choices))}" if action.choices else ""
            yield _row(f"`{_argument(action)}`", (action.help or "") + choices)
        if arguments:
            yield ""


def methods_table() -> Iterator[str]:
    """The rows of the paper's Table 1, the controls and the rivals."""
    yield _row("name", "what", "source", "parameters")
    yield "|---|---|---|---|"
    for entry in methods().values():
        given = ", ".join(f"`{name}: {value}`" for name, value in entry.parameters.items())
        yield _row(f"`{entry.name}`", entry.what, entry.source, given)


def _glossary(metrics: dict[str, str]) -> Iterator[str]:
    yield _row("metric", "what it is")
    yield "|---|---|"
    for name, meaning in metrics.items():
        yield _row(f"`{name}`", meaning)


def metrics() -> Iterator[str]:
    """The metrics of every task."""
    yield from _glossary(GLOSSARY)


def task_metrics() -> Iterator[str]:
    """The metrics of the paper's task."""
    yield from _glossary(TASK_GLOSSARY)


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "parameters": parameters,
    "trl": trl,
    "commands": commands,
    "methods": methods_table,
    "metrics": metrics,
    "task_metrics": task_metrics,
}


def filled(text: str) -> str:
    """A page with its tables as the package declares them now."""

    def block(match: re.Match[str]) -> str:
        lines = "\n".join(TABLES[match[2]]()).strip()
        return f"{match[1]}\n{lines}\n\n{match[3]}"

    return _BLOCK.sub(block, text)


def main() -> None:
    """Rewrite the pages whose tables have changed."""
    for page in sorted(PAGES.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            page.write_text(new, encoding="utf-8")
            print(f"docs: wrote {page.relative_to(PAGES.parent)}")


if __name__ == "__main__":
    main()
