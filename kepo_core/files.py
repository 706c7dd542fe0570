"""Files that are whole or not there at all, JSON that any reader takes, locks and sockets."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kepo_core.errors import ParamError


def write_atomically(path: Path, text: str) -> None:
    """Write the whole text or nothing: readers never see half a file."""
    with in_place_of(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def in_place_of(path: Path) -> Iterator[Path]:
    """A file to write, which then replaces ``path``; after an error, such as a full disk, it is deleted."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # several processes may write one index
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def locked(path: Path) -> FileLock:
    """The acquired lock on a file; ``Timeout`` if another process holds it."""
    lock = FileLock(path, thread_local=False)
    lock.acquire(timeout=1)  # longer than `is_locked` holds it
    return lock


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock on a file: on this machine, or on another that shares the disk."""
    try:
        import fcntl
    except ImportError:  # Windows, which has no shared locks
        try:
            locked(path).release()
        except Timeout:
            return True
        return False
    try:
        with path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: readers do not mistake one another for its owner
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def holds_sockets(folder: str) -> bool:
    """Whether `multiprocessing` can bind a socket in ``folder``: paths have up to 107 bytes on Linux, 103 on macOS."""
    return len(os.fsencode(f"{folder}/pymp-12345678/listener-12345678")) <= 103


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `ParamError` naming the file if it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ParamError(f"{path} cannot be read: {reason}") from error
    if not isinstance(found, dict):
        raise ParamError(f"{path} holds {found!r}, expected a JSON object")
    return found


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Readable JSON, written atomically; numbers that are not finite become null."""
    write_atomically(path, json.dumps(_plain(data), indent=2, ensure_ascii=False) + "\n")


def json_line(row: Mapping[str, Any]) -> str:
    """One line of JSON; numbers that are not finite become null."""
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Plain Python data: scalars of numpy and torch by their ``item``, non-finite numbers as ``None``."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if not isinstance(value, str | int | float | None):
        if not callable(item := getattr(value, "item", None)):
            raise TypeError(f"{value!r} is not plain data and cannot be written as JSON")
        value = item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
