"""The project's root, and how paths are resolved and shown."""

from pathlib import Path


def project_root() -> Path:
    """The checkout's top folder: the nearest one above the working directory, or else above this file.

    It contains ``notebooks/`` and ``params/phantom.yaml``. An installed package without either uses the working
    directory, so results land where the user is.
    """
    for start in (Path.cwd(), Path(__file__).resolve().parent):
        for folder in (start, *start.parents):
            if (folder / "params" / "phantom.yaml").is_file() and (folder / "notebooks").is_dir():
                return folder
    return Path.cwd()


def resolve(path: str | Path) -> Path:
    """A path from a user: absolute, or relative to the working directory, or else to the project's root."""
    path = _at_home(path)
    if path.is_absolute() or _is_there(path):
        return path.absolute()
    return project_root() / path


def at_root(path: str | Path) -> Path:
    """A path relative to the project's root, whatever the working directory: ``results_dir``, ``run_dir``."""
    return project_root() / _at_home(path)


def _at_home(path: str | Path) -> Path:
    """``~`` replaced; ``~NAME`` of an unknown user stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # not a valid file name
        return False


def anchored(path: str) -> str:
    """A relative path that exists from here, rewritten relative to the project's root; others as they are.

    So processes with another working directory find it: a resumed run, a training process, a job.
    """
    found = resolve(path)
    given = bool(path) and not _at_home(path).is_absolute()
    return from_root(found) if given and _is_there(found) else path


def shown(path: Path) -> str:
    """A path as shown to a reader in this working directory: outside the project, `from_root` would mislead."""
    return from_root(path) if Path.cwd().is_relative_to(project_root()) else str(path)


def from_root(path: Path) -> str:
    """A path as written in files and pages: relative to the project's root if it lies below it."""
    root = project_root()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)
