"""``SHA256SUMS``: what the files of a folder were when it was completed, as ``sha256sum -c`` reads it."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from kepo_core.errors import ParamError
from kepo_core.files import write_atomically

NAME = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def digests(folder: Path, without: Iterable[Path] = ()) -> dict[str, str]:
    """Relative path → SHA-256 of every file below ``folder``, sorted; all but itself and what lies in ``without``."""
    return {path.relative_to(folder).as_posix(): _digest(path) for path in _files(folder, without)}


def to_text(found: Mapping[str, str]) -> str:
    """The lines of ``SHA256SUMS``."""
    return "".join(f"{digest}  {name}\n" for name, digest in found.items())


def refresh(folder: Path, name: str) -> None:
    """Note anew what the file ``name`` is, where ``folder`` was completed and has it noted."""
    if (folder / NAME).is_file():
        noted = read(folder)
        if name in noted:
            write_atomically(folder / NAME, to_text({**noted, name: _digest(folder / name)}))


def read(folder: Path) -> dict[str, str]:
    """What ``SHA256SUMS`` of ``folder`` says; `ParamError` naming the line that is none."""
    path, found = folder / NAME, {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ParamError(f"{NAME} cannot be read ({error})") from error
    for number, line in enumerate(lines, start=1):
        if not (match := _LINE.fullmatch(line)):
            raise ParamError(f"{NAME}, line {number}: {line[:80]!r}, expected 64 hexadecimal digits and a file's path")
        found[match[2]] = match[1]
    return found


def differences(folder: Path, without: Iterable[Path] = ()) -> dict[str, list[str]]:
    """What became of the files since: ``changed``, ``missing`` and ``new`` ones, where there are any.

    Raises `ParamError` as `read` does.
    """
    noted, now = read(folder), digests(folder, without)
    found = {
        "changed": [name for name in noted if now.get(name, noted[name]) != noted[name]],
        "missing": [name for name in noted if name not in now],
        "new": [name for name in now if name not in noted],
    }
    return {kind: names for kind, names in found.items() if names}


def _files(folder: Path, without: Iterable[Path]) -> Iterator[Path]:
    left_out = {folder / NAME, *without}
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        if path.is_file() and not left_out & {path, *path.parents}:
            yield path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
