"""Where questions and pictures lie: a folder, or the release's zip archive, read in place.

Both give question files as bytes and turn the relative image paths of rows into absolute ones that never leave their
root. Of an archive, only the pictures that are fetched are unpacked, into the cache folder.
"""

import hashlib
import os
import re
import stat
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Protocol

from kepo_core.data.ledger import RowError
from kepo_core.errors import DataError

QA_FOLDER = PurePosixPath("QA_information") / "Open-access"
#: Largest member of an archive that is unpacked, in bytes; a question file of the release is a few megabytes.
MAX_MEMBER = 512 * 2**20


class Source(Protocol):
    """What the readers of both layouts need of a folder or an archive."""

    root: Path  # as error messages name it

    def question_files(self, under: PurePosixPath | None = None) -> list[PurePosixPath]:
        """The ``*.json`` files right in the folder ``under``, or anywhere, in name order."""

    def read(self, file: PurePosixPath) -> bytes:
        """One of these files. Raises ``DataError`` if it cannot be read."""

    def locate(self, relative: str, where: str, must_exist: bool = True) -> Path:
        """Where the picture that a row at ``where`` names is, or will be once fetched.

        Raises ``RowError`` if it leaves the root or does not exist.
        """

    def fetch(self, image: Path) -> None:
        """See that a located picture is on disk. Raises ``DataError`` if it cannot be unpacked."""


def cache_dir() -> Path:
    """Where what can be made again is kept: ``$KEPO_CACHE``, else ``~/.cache/kepo``.

    Raises ``DataError`` for a user without a home, as in some containers.
    """
    try:
        return Path(os.environ.get("KEPO_CACHE", "~/.cache/kepo")).expanduser()
    except RuntimeError as error:
        raise DataError("this user has no home folder: set KEPO_CACHE to a folder that can be written.") from error


def in_cache(name: str) -> Path:
    """A folder of the cache, made and written to. Raises ``DataError`` where that cannot be."""
    folder = cache_dir() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise DataError(
            f"{cache_dir()} cannot be written ({error.strerror}): set KEPO_CACHE to a folder that can be, it keeps "
            "unpacked pictures, PhantomVQA and hints."
        ) from error
    return folder


def open_source(root: Path) -> Source:
    """The folder or zip archive at ``root``. Raises ``DataError`` if it is neither."""
    root = Path(root).expanduser().resolve()
    if root.is_file():
        return Archive(root)
    if not root.is_dir():
        raise DataError(
            f"data_root {root} does not exist, expected a folder (OmniMedVQA's release or Med-R1's question files) or "
            "OmniMedVQA.zip."
        )
    return Folder(root)


def _checked(relative: str, where: str) -> PurePosixPath:
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts or "\0" in relative or re.match(r"[A-Za-z]:[\\/]|\\", relative):
        raise RowError(
            "image path leaves data_root",
            f"{where}: image_path {relative!r} leaves data_root, expected a relative path inside it.",
        )
    return path


def _missing(relative: str, where: str) -> RowError:
    return RowError("image missing", f"{where}: image {relative!r} is missing under data_root, expected a file.")


class Folder:
    """A folder of questions. Its pictures lie in it or, if it has no ``Images``, in the nearest one above that has."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._home = next((f for f in (root, *root.parents[:3]) if (f / "Images").is_dir()), root)
        self._folders: dict[Path, Path] = {}  # rows share few of them

    @property
    def has_images(self) -> bool:
        """Whether there is a folder of pictures at all."""
        return (self._home / "Images").is_dir()

    def question_files(self, under: PurePosixPath | None = None) -> list[PurePosixPath]:
        """See `Source`."""
        found = self.root.rglob("*.json") if under is None else (self.root / under).glob("*.json")
        return sorted(PurePosixPath(file.relative_to(self.root).as_posix()) for file in found)

    def read(self, file: PurePosixPath) -> bytes:
        """See `Source`."""
        try:
            return (self.root / file).read_bytes()
        except OSError as error:
            raise DataError(f"{file.name}: cannot be read ({error}), expected a question file.") from error

    def locate(self, relative: str, where: str, must_exist: bool = True) -> Path:
        """See `Source`."""
        path = self._home / _checked(relative, where)
        absolute = self._folder(path.parent) / path.name
        if absolute.is_symlink():
            absolute = absolute.resolve()
        if not absolute.is_relative_to(self._home):
            raise RowError(
                "image link leaves data_root",
                f"{where}: image_path {relative!r} is a link out of data_root, expected a file inside it.",
            )
        if must_exist and not absolute.is_file():
            raise _missing(relative, where)
        return absolute

    def fetch(self, image: Path) -> None:
        """Nothing to do: the pictures of a folder are on disk."""

    def _folder(self, folder: Path) -> Path:
        if folder not in self._folders:
            self._folders[folder] = Path(os.path.realpath(folder))
        return self._folders[folder]


class Archive:
    """The release as it is downloaded: one zip file, in it (in some folder) ``QA_information`` and ``Images``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            self._zip = zipfile.ZipFile(root)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"data_root {root}: not a whole zip archive ({error}), expected OmniMedVQA.zip.") from error
        digest = hashlib.sha256()
        self._members: dict[str, zipfile.ZipInfo] = {}
        for info in self._zip.infolist():
            if PurePosixPath(info.filename).is_absolute() or ".." in PurePosixPath(info.filename).parts:
                raise DataError(f"data_root {root}: its member {info.filename!r} leaves it, expected paths inside.")
            if stat.S_ISLNK(info.external_attr >> 16):
                raise DataError(f"data_root {root}: its member {info.filename!r} is a link, expected files.")
            digest.update(f"{info.filename}\n{info.CRC}\n".encode())
            self._members[info.filename] = info
        first = next((name for name in self._members if f"{QA_FOLDER}/" in f"/{name}"), None)
        if first is None:
            raise DataError(f"data_root {root}: no {QA_FOLDER}/*.json in it, expected OmniMedVQA.zip.")
        self._prefix = first[: first.index(str(QA_FOLDER))]
        #: The content decides the folder, so that another archive of the same name gets another one.
        self._unpacked = cache_dir().resolve() / f"{root.stem}-{digest.hexdigest()[:12]}"

    def question_files(self, under: PurePosixPath | None = None) -> list[PurePosixPath]:
        """See `Source`."""
        names = (name.removeprefix(self._prefix) for name in self._members if name.endswith(".json"))
        return sorted(file for name in names if (file := PurePosixPath(name)).parent == under or under is None)

    def read(self, file: PurePosixPath) -> bytes:
        """See `Source`."""
        return self._read(self._members[f"{self._prefix}{file}"])

    def locate(self, relative: str, where: str, must_exist: bool = True) -> Path:
        """See `Source`."""
        path = _checked(relative, where)
        if must_exist and f"{self._prefix}{path}" not in self._members:
            raise _missing(relative, where)
        return self._unpacked / path

    def fetch(self, image: Path) -> None:
        """Unpack one located picture into the cache, whole or not at all."""
        if image.is_file():
            return
        content = self._read(self._members[f"{self._prefix}{image.relative_to(self._unpacked).as_posix()}"])
        in_cache(self._unpacked.name)
        image.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=image.parent) as partial:
            whole = Path(partial) / image.name
            whole.write_bytes(content)
            whole.replace(image)

    def _read(self, info: zipfile.ZipInfo) -> bytes:
        member = f"{self.root.name}: its member {info.filename!r}"
        if info.file_size > MAX_MEMBER:
            raise DataError(f"{member} unpacks to {info.file_size:,} bytes, expected at most {MAX_MEMBER:,}.")
        try:
            return self._zip.read(info)
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError) as error:
            raise DataError(f"{member} cannot be unpacked ({error}), expected a whole archive.") from error
