"""Where questions and pictures lie: a folder, or the release's zip archive, read in place.

Both give question files as bytes and turn the relative image paths of rows into absolute ones that never leave their
root. From an archive, only the pictures that are fetched are unpacked, into the cache folder.
"""

import hashlib
import os
import re
import stat
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Protocol

from kepo_core.data.ledger import RowError
from kepo_core.errors import DataError

QA_FOLDER = PurePosixPath("QA_information") / "Open-access"
#: Largest member of an archive that is unpacked, in bytes; a question file of the release is a few megabytes.
MAX_MEMBER = 512 * 2**20
_OTHER = re.compile(
    r"\.(ndjson|csv|tsv|xlsx?|ods|parquet|arrow|feather|((jsonl?|ndjson|csv|tsv)\.\w+))$", re.IGNORECASE
)
#: What can be a data set's root.
EXPECTED = (
    "a folder (OmniMedVQA's release, Med-R1's question files, or a table and its pictures), a table (.csv, .jsonl, "
    ".parquet), OmniMedVQA.zip, or hf:OWNER/NAME"
)
#: The end of a message about a file behind a link that leaves the root.
OUTSIDE = "is a link out of data_root, expected a file inside it, or follow_links: True"


class Source(Protocol):
    """What the readers of both layouts need from a folder or an archive."""

    root: Path  # as error messages name it

    def question_files(self, under: PurePosixPath | None = None) -> list[PurePosixPath]:
        """The JSON and JSON lines files in and below the folder ``under``, or anywhere, in name order."""

    def other_files(self) -> list[PurePosixPath]:
        """Files below the root that may hold questions but are of a kind that no reader takes."""

    def read(self, file: PurePosixPath) -> bytes:
        """One of these files. Raises ``DataError`` if it cannot be read."""

    def locate(self, relative: str, where: str, must_exist: bool = True) -> Path:
        """Where the picture named by the row at ``where`` is, or will be once fetched.

        Raises ``RowError`` if it leaves the root or does not exist.
        """

    def fetch(self, image: Path) -> None:
        """Put a located picture on disk. Raises ``DataError`` if it cannot be unpacked."""

    def content(self, image: Path) -> bytes:
        """The bytes of a located picture's file, fetched or not. Raises ``DataError`` if it cannot be read."""

    def stamp(self, image: Path) -> str:
        """A text that changes whenever the file of a located picture changes."""


def cache_dir() -> Path:
    """The folder for files that can be made again: ``$KEPO_CACHE``, or else ``~/.cache/kepo``.

    Raises ``DataError`` for a user without a home folder, as in some containers.
    """
    try:
        return Path(os.environ.get("KEPO_CACHE", "~/.cache/kepo")).expanduser()
    except RuntimeError as error:
        raise DataError("this user has no home folder: set KEPO_CACHE to a writable folder.") from error


def in_cache(name: str) -> Path:
    """A folder of the cache, created if missing. Raises ``DataError`` if it cannot be created or written."""
    folder = cache_dir() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise DataError(
            f"{cache_dir()} cannot be written ({error.strerror}): set KEPO_CACHE to a writable folder, for unpacked "
            "pictures, PhantomVQA and hints."
        ) from error
    return folder


def write_whole(image: Path, content: bytes) -> None:
    """Write a file of the cache, whole or not at all, even if others write it at the same time."""
    image.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=image.parent) as partial:
        whole = Path(partial) / image.name
        whole.write_bytes(content)
        whole.replace(image)


def open_source(root: Path, follow_links: bool = False) -> Source:
    """The folder or zip archive at ``root``; ``follow_links`` as in `Folder`.

    Raises ``DataError`` if it is neither.
    """
    given = Path(root).expanduser()
    root = Path(os.path.realpath(given))
    if root.is_file():
        if ".zip" in (given.suffix.lower(), root.suffix.lower()) or zipfile.is_zipfile(root):
            return Archive(root)
        raise DataError(f"data_root {given} is a file of an unknown kind, expected {EXPECTED}.")
    if not root.is_dir():
        raise DataError(f"data_root {root} does not exist, expected {EXPECTED}.")
    return Folder(root, follow_links)


def picture_name(relative: str) -> str:
    """A row's path of its picture, the same wherever the data lie: relative to the root, with forward slashes.

    Windows' backslashes are converted, and a slash in front (``/Images/…``) is removed.
    """
    return str(PurePosixPath(relative.replace("\\", "/").lstrip("/")))


def _checked(relative: str, where: str) -> list[PurePosixPath]:
    """Where to look for a picture: its path inside the root, also with accents as other systems encode them."""
    path = picture_name(relative)
    if ".." in path.split("/") or "\0" in path or re.match(r"[A-Za-z]:(/|$)", path):
        raise _leaves(relative, where)
    others = () if path.isascii() else (unicodedata.normalize(form, path) for form in ("NFC", "NFD"))
    return [PurePosixPath(path), *map(PurePosixPath, others)]


def _leaves(relative: str, where: str) -> RowError:
    return RowError(
        "image path leaves data_root",
        f"{where}: image_path {relative!r:.200} leaves data_root, expected a relative path inside it.",
    )


def _missing(relative: str, where: str) -> RowError:
    if relative.startswith(("/", "\\")):
        return _leaves(relative, where)
    return RowError("image missing", f"{where}: image {relative!r:.200} is missing under data_root, expected a file.")


def is_question_file(file: PurePosixPath) -> bool:
    """JSON or JSON lines, except the files that macOS adds to archives."""
    return file.suffix.lower() in (".json", ".jsonl") and not _of_macos(file)


def _is_other_file(file: PurePosixPath) -> bool:
    """A table or compressed JSON, except files among pictures, which describe the pictures."""
    return bool(_OTHER.search(file.name)) and not _hidden(file) and "Images" not in file.parts


def _hidden(file: PurePosixPath) -> bool:
    return _of_macos(file) or any(part.startswith(".") for part in file.parts)


def _of_macos(file: PurePosixPath) -> bool:
    return file.name.startswith("._") or "__MACOSX" in file.parts


class Folder:
    """A folder of questions. Its pictures lie in it or, if it has no ``Images``, in the nearest folder above with one.

    ``follow_links``: also read files outside of it that links lead to, as in the Hub's cache.
    """

    def __init__(self, root: Path, follow_links: bool = False) -> None:
        self.root, self.follow_links = root, follow_links
        self._home = next((f for f in (root, *root.parents[:3]) if (f / "Images").is_dir()), root)
        self._folders: dict[Path, Path] = {}  # resolved once: many rows share one

    @property
    def has_images(self) -> bool:
        """Whether there is a folder of pictures."""
        return (self._home / "Images").is_dir()

    def question_files(self, under: PurePosixPath | None = None) -> list[PurePosixPath]:
        """See `Source`."""
        found = self._files(under, is_question_file)
        if outside := [file for file in found if self._real(self.root / file) is None]:
            raise DataError(f"data_root {self.root}: {outside[0]} {OUTSIDE}.")
        return found

    def other_files(self) -> list[PurePosixPath]:
        """See `Source`."""
        return self._files(None, _is_other_file)

    def _files(self, under: PurePosixPath | None, wanted: Callable[[PurePosixPath], bool]) -> list[PurePosixPath]:
        found: list[PurePosixPath] = []
        been: set[str] = set()
        for folder, folders, names in os.walk(self.root / (under or ""), followlinks=self.follow_links):
            if (real := os.path.realpath(folder)) in been:
                folders.clear()  # a link back
                continue
            been.add(real)
            here = PurePosixPath(Path(folder).relative_to(self.root).as_posix())
            found += filter(wanted, (here / name for name in names))
        return sorted(found)

    def read(self, file: PurePosixPath) -> bytes:
        """See `Source`."""
        try:
            return (self.root / file).read_bytes()
        except OSError as error:
            raise DataError(f"{file.name}: cannot be read ({error}), expected a question file.") from error

    def locate(self, relative: str, where: str, must_exist: bool = True) -> Path:
        """See `Source`."""
        for path in _checked(relative, where):
            try:
                absolute = self._real(self._home / path)
                there = absolute is not None and absolute.is_file()
            except OSError:  # not a valid file name
                continue
            if absolute is None:
                raise RowError("image link leaves data_root", f"{where}: image_path {relative!r:.200} {OUTSIDE}.")
            if there or not must_exist:
                return absolute
        raise _missing(relative, where)

    def fetch(self, image: Path) -> None:
        """Nothing to do: the pictures of a folder are on disk."""

    def content(self, image: Path) -> bytes:
        """See `Source`."""
        try:
            return image.read_bytes()
        except OSError as error:
            raise DataError(f"Image {image}: cannot be read ({error.strerror}), expected an image file.") from error

    def stamp(self, image: Path) -> str:
        """The file's size, modification time and change time (which programs cannot set); "" if it is missing."""
        try:
            found = image.stat()
        except OSError:
            return ""
        return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"

    def _real(self, path: Path) -> Path | None:
        """Where ``path`` leads; None if it leads outside and links are not followed."""
        if path.parent not in self._folders:
            self._folders[path.parent] = Path(os.path.realpath(path.parent))
        absolute = self._folders[path.parent] / path.name
        if absolute.is_symlink():
            absolute = Path(os.path.realpath(absolute))  # resolve() raises for a link to itself
        return absolute if self.follow_links or absolute.is_relative_to(self._home) else None


class Archive:
    """The release as downloaded: one zip file with ``QA_information`` and ``Images`` in any folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            self._zip = zipfile.ZipFile(root)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"data_root {root}: not a whole zip archive ({error}), expected OmniMedVQA.zip.") from error
        digest = hashlib.sha256()
        self._members: dict[str, zipfile.ZipInfo] = {}
        for info in self._zip.infolist():
            file = PurePosixPath(info.filename.replace("\\", "/"))  # as Windows packs them
            if _of_macos(file):
                continue
            if file.is_absolute() or ".." in file.parts:
                raise DataError(f"data_root {root}: member {info.filename!r} leads outside, expected paths inside.")
            if stat.S_ISLNK(info.external_attr >> 16):
                raise DataError(f"data_root {root}: member {info.filename!r} is a link, expected files.")
            digest.update(f"{info.filename}\n{info.CRC}\n".encode())
            self._members[str(file)] = info
        prefixes = [found[1] for name in self._members if (found := re.match(rf"((?:.*/)?){QA_FOLDER}/", name))]
        if not prefixes:
            raise DataError(f"data_root {root}: no {QA_FOLDER}/*.json in it, expected {EXPECTED}.")
        self._prefix = min(prefixes, key=len)  # a copy deeper inside is not the release
        #: Named by content, so that another archive of the same name gets another folder.
        self._unpacked = cache_dir().resolve() / f"{root.stem}-{digest.hexdigest()[:12]}"

    def question_files(self, under: PurePosixPath | None = None) -> list[PurePosixPath]:
        """See `Source`."""
        start = f"{self._prefix}{under}/" if under else self._prefix
        files = (PurePosixPath(name[len(self._prefix) :]) for name in self._members if name.startswith(start))
        return sorted(filter(is_question_file, files))

    def other_files(self) -> list[PurePosixPath]:
        """See `Source`."""
        names = (name[len(self._prefix) :] for name in self._members if name.startswith(self._prefix))
        return sorted(filter(_is_other_file, map(PurePosixPath, names)))

    def read(self, file: PurePosixPath) -> bytes:
        """See `Source`."""
        return self._read(self._members[f"{self._prefix}{file}"])

    def locate(self, relative: str, where: str, must_exist: bool = True) -> Path:
        """See `Source`."""
        for path in _checked(relative, where):
            if f"{self._prefix}{path}" in self._members or not must_exist:
                return self._unpacked / path
        raise _missing(relative, where)

    def fetch(self, image: Path) -> None:
        """Unpack one located picture into the cache, whole or not at all."""
        if image.is_file():
            return
        in_cache(self._unpacked.name)
        write_whole(image, self.content(image))

    def content(self, image: Path) -> bytes:
        """See `Source`."""
        return self._read(self._members[f"{self._prefix}{image.relative_to(self._unpacked).as_posix()}"])

    def stamp(self, image: Path) -> str:
        """The picture's name: its folder is already named by the archive's content."""
        return image.name

    def _read(self, info: zipfile.ZipInfo) -> bytes:
        member = f"{self.root.name}: member {info.filename!r}"
        if info.file_size > MAX_MEMBER:
            raise DataError(f"{member} unpacks to {info.file_size:,} bytes, expected at most {MAX_MEMBER:,}.")
        try:
            return self._zip.read(info)
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError) as error:
            raise DataError(f"{member} cannot be unpacked ({error}), expected a whole archive.") from error
