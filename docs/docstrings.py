"""The package's docstrings as reStructuredText: fenced examples become doctests, ``name: …`` lines become arguments."""

import inspect
import re
from typing import Any

from sphinx.application import Sphinx

_ARGUMENT = re.compile(r"(\w+): \S")


def unfenced(lines: list[str]) -> list[str]:
    """Without the fences of Markdown: reStructuredText knows an example by its ``>>>``, after an empty line."""
    return ["" if line.strip().startswith("```") else line for line in lines]


def escaped(line: str) -> str:
    """With ``|`` and ``**kwargs`` as plain characters, outside of code: π_θ(y|x) is no substitution."""
    if line.lstrip().startswith(">>>"):
        return line
    parts = line.split("``")
    parts[::2] = [part.replace("|", r"\|").replace("**kwargs", r"\*\*kwargs") for part in parts[::2]]
    return "``".join(parts)


def with_arguments(lines: list[str], names: set[str]) -> list[str]:
    """Lines such as ``tau: the threshold.``, where ``tau`` is an argument, moved into an ``Args:`` section."""
    rest: list[str] = []
    arguments: list[str] = []
    inside = False
    for line in lines:
        match = _ARGUMENT.match(line)
        if match and match[1] in names:
            inside = True
        elif line.strip() and not line.startswith(" "):
            inside = False
        (arguments if inside else rest).append(f"    {line}" if inside else line)
    return [*rest, "", "Args:", *arguments, ""] if arguments else rest


def convert(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Change the docstring of ``thing`` in place, before napoleon reads its sections."""
    text = [escaped(line) for line in unfenced(lines)]
    if what in ("function", "method"):
        text = with_arguments(text, set(inspect.signature(thing).parameters))
    lines[:] = text


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", convert, priority=400)  # napoleon has 500
    return {"parallel_read_safe": True}
