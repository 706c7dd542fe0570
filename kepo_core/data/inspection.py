"""Decodes each picture before a run: whether it is whole, how large it is, and which others it equals.

Pictures are compared as decoded (`images.load_image`: rotated, RGB). Two files that show the same are one picture,
whatever their names, compression or folders.
"""

import contextlib
import hashlib
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import PIL
from PIL import Image
from tqdm import tqdm

from kepo_core.data.images import decode
from kepo_core.data.ledger import Ledger, RowError
from kepo_core.data.records import Question
from kepo_core.data.source import Source, cache_dir
from kepo_core.data.splits import image_key
from kepo_core.errors import DataError
from kepo_core.files import write_atomically

#: Cached results of earlier inspections are valid only for the same decoder.
_DECODER = f"1, Pillow {PIL.__version__}"
#: Pictures decoded at a time, at most: the largest allowed 16-bit scan takes 2 GB while it is decoded.
MOST_AT_ONCE = 4
TWINS = "pictures with a copy under another name: both count as one"


@dataclass(frozen=True, slots=True)
class Seen:
    """What was found in one picture: width and height in pixels, and a hash of its size and RGB values (hex).

    ``problem`` says why it cannot be decoded; the other fields are then empty.
    """

    width: int = 0
    height: int = 0
    content: str = ""
    problem: str = ""


class Inspector:
    """Decodes each picture of a source once, on up to four cores; results are cached by the file's time and size.

    Decoding is the whole cost: one core decodes 4,900 pictures of 64×64 pixels (PNG) or 390 photographs of 640×480
    (JPEG) a second. At the latter rate, the 82,000 pictures of OmniMedVQA take three and a half minutes, once.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._found: dict[Path, Seen] = {}

    def __call__(self, image: Path) -> Seen:
        """What was found in one picture; it is decoded now unless it was before."""
        if image not in self._found:
            self._found[image] = self._look(image)
        return self._found[image]

    def inspect(self, images: Iterable[Path]) -> None:
        """Decode those ``images`` that neither this nor an earlier process has decoded; slow ones show a bar."""
        kept = self._read_kept()
        missing: list[Path] = []
        stamps = {}
        for image in dict.fromkeys(images):
            stamps[image] = self.source.stamp(image)
            if image in self._found:
                continue
            row = kept.get(str(image))
            if row and row["stamp"] == stamps[image]:
                self._found[image] = Seen(row["width"], row["height"], row["content"])
            else:
                missing.append(image)
        with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_AT_ONCE)) as pool:
            done = tqdm(pool.map(self._look, missing), "pictures", len(missing), delay=1)
            self._found |= zip(missing, done, strict=True)
        fresh = {image: self._found[image] for image in missing if not self._found[image].problem}
        if fresh:
            new = {str(image): asdict(seen) | {"stamp": stamps[image]} for image, seen in fresh.items()}
            self._keep(kept | new)

    def _look(self, image: Path) -> Seen:
        try:
            picture = decode(io.BytesIO(self.source.content(image)), image)
        except DataError as error:
            return Seen(problem=str(error))
        return Seen(picture.width, picture.height, _content(picture))

    @property
    def _file(self) -> Path:
        name = hashlib.sha256(f"{self.source.root}\n{_DECODER}".encode()).hexdigest()[:16]
        return cache_dir() / "inspected" / f"{name}.json"

    def _read_kept(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._file.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}  # no cache yet, or one that cannot be read: everything is decoded

    def _keep(self, rows: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # if the cache cannot be written, the next process decodes again
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, json.dumps(rows))


def _content(picture: Image.Image) -> str:
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


def name_once(questions: Iterable[Question], inspector: Inspector, ledger: Ledger) -> list[Question]:
    """``questions`` with one ``image_name`` per picture: of several that show the same, the first in the alphabet.

    So splits keep copies together, and leaks and statistics treat them as one picture. The ledger counts the other
    names. A picture that cannot be decoded equals no other.
    """
    questions = list(questions)
    inspector.inspect(question.image for question in questions)
    names: dict[str, set[str]] = defaultdict(set)
    for question in questions:
        seen = inspector(question.image)
        if seen.content:
            names[seen.content].add(image_key(question))
    first = {name: min(same) for same in names.values() if len(same) > 1 for name in same}
    for name, other in sorted(first.items()):
        if name != other:
            ledger.mend(TWINS, f"{name} shows what {other} shows")
    return [replace(q, image_name=first[image_key(q)]) if image_key(q) in first else q for q in questions]


class Decodable:
    """Whether a question's picture can be decoded; questions whose picture cannot go to the ledger."""

    def __init__(self, ledger: Ledger, inspector: Inspector) -> None:
        self.ledger, self.inspector = ledger, inspector

    def __call__(self, question: Question) -> bool:
        """True if it can; else False, and the ledger notes it (or raises if it is strict)."""
        problem = self.inspector(question.image).problem
        if problem:
            self.ledger.drop(RowError("image cannot be decoded", f"Question {question.id}: {problem}"))
        return not problem
