"""Origin of a run: code, versions, hardware, seeds. No machine paths and no host names."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import kepo_core
from kepo_core.errors import ParamError
from kepo_core.params import Params, project_root

#: The packages whose versions can change a number.
PACKAGES = (
    "kepo-core",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "tokenizers",
    "peft",
    "numpy",
    "pandas",
    "pillow",
)


def collect(params: Params) -> dict[str, Any]:
    """The provenance known when the folder is made. Hardware and data are added later, by the process that computes."""
    return {
        "params_hash": params.hash,
        "code": {**code(project_root()), "package": package_digest()},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "seeds": {"seed": params.seed, "data_seed": params.data_seed},
    }


def code(root: Path) -> dict[str, str]:
    """The commit and a hash of uncommitted changes and new files ("" if none); a note if git fails."""
    commit = ""
    try:
        commit = _git(root, "rev-parse", "HEAD").decode().strip()
        changes = _git(root, "diff", "HEAD", "--binary", "--no-ext-diff", "--no-textconv")
        new_files = _git(root, "ls-files", "--others", "--exclude-standard", "-z").split(b"\0")[:-1]
    except GitError as reason:
        return {"commit": commit, "uncommitted": "", "note": str(reason)}
    digest = hashlib.sha256(changes)
    for name in sorted(new_files):
        file = root / os.fsdecode(name)
        digest.update(b"\0" + name + b"\0" + (file.read_bytes() if file.is_file() else b""))
    return {"commit": commit, "uncommitted": digest.hexdigest()[:16] if changes or new_files else ""}


@cache
def package_digest() -> str:
    """A hash of the package's files that can change a number (modules, tables, models): 16 hexadecimal digits.

    Unlike the commit it does not change with texts or tests.
    """
    digest, package = hashlib.sha256(), Path(kepo_core.__file__).parent
    for file in sorted(
        p for p in package.rglob("*") if p.suffix in (".py", ".yaml", ".json", ".jinja", ".safetensors")
    ):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def notebook_code(path: Path) -> list[str]:
    """The code cells of a notebook. Raises `ParamError` for a file that is not a notebook."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError) as error:
        raise ParamError(f"notebook {path.name} cannot be read as a notebook: {type(error).__name__}") from error


def notebook_digest(path: Path) -> str:
    """A hash of a notebook's code, without texts and outputs: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(notebook_code(path)).encode()).hexdigest()[:16]


def hardware() -> dict[str, Any]:
    """The machine of this process; threads and GPUs only if the process has loaded torch."""
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
    }
    if torch := sys.modules.get("torch"):
        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        found |= {"torch_threads": torch.get_num_threads(), "gpus": gpus}
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


class GitError(RuntimeError):
    """Git does not describe the code; the message is the reason, without machine paths."""


def _git(root: Path, *args: str) -> bytes:
    """Git's output, also in a folder of another owner (a container, a shared disk): its code runs here anyway.

    ``GIT_*`` variables of the environment, which may name another repository, are ignored. Raises `GitError` if git or
    the repository is missing, or git refuses.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    git = ["git", "-c", "safe.directory=*", "-c", "core.fsmonitor=false"]
    try:
        return subprocess.run([*git, *args], cwd=root, capture_output=True, check=True,
                              env={**environment, "LC_ALL": "C"}).stdout  # fmt: skip
    except OSError as error:
        raise GitError(f"git cannot be run, so the code's commit is unknown ({error.strerror})") from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[0]
        if "not a git repository" in said:
            raise GitError("the code did not run from a git checkout") from error
        raise GitError(f"git cannot name the code that ran: {said.replace(str(root), '.')}") from error
