"""Where the project lies, and how paths are meant and shown."""

from pathlib import Path


def project_root() -> Path:
    """The checkout's top folder: the nearest one above the working directory, else above this file.

    It is known by its ``notebooks/`` and ``params/phantom.yaml``. An installed package without either falls back to the
    working directory, so results land where the user stands.
    """
    for start in (Path.cwd(), Path(__file__).resolve().parent):
        for folder in (start, *start.parents):
            if (folder / "params" / "phantom.yaml").is_file() and (folder / "notebooks").is_dir():
                return folder
    return Path.cwd()


def resolve(path: str | Path) -> Path:
    """A path as the user means it: absolute, from the working directory, else from the project's root."""
    path = _at_home(path)
    if path.is_absolute() or _is_there(path):
        return path.absolute()
    return project_root() / path


def at_root(path: str | Path) -> Path:
    """A path that is meant from the project's root, wherever the process works: ``results_dir``, ``run_dir``."""
    return project_root() / _at_home(path)


def _at_home(path: str | Path) -> Path:
    """``~`` replaced; the name of a user that there is not stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no disk takes
        return False


def anchored(path: str) -> str:
    """A relative path that leads somewhere from here, as it is meant from the project's root; others as they are.

    What is kept in it is found again by processes that work elsewhere: a run resumed, a training process, a job.
    """
    found = resolve(path)
    given = bool(path) and not _at_home(path).is_absolute()
    return from_root(found) if given and _is_there(found) else path


def shown(path: Path) -> str:
    """A path for somebody who reads it where this process works: outside the project, `from_root` would mislead."""
    return from_root(path) if Path.cwd().is_relative_to(project_root()) else str(path)


def from_root(path: Path) -> str:
    """A path as files and pages note it: from the project's root where it lies below it."""
    root = project_root()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)
