"""The embedded models: student, middle model and teacher, each trained from its own seed.

``python -m kepo_core.testbed.school PUPIL FOLDER`` trains one of them on one thread; started again, it resumes. They
differ in size, in the length of their schooling, and in how many meanings it contains (``lessons.PACE``); no weights
are copied.
"""

import argparse
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kepo_core.experiment.models import save_embedded
from kepo_core.experiment.threads import one_thread
from kepo_core.testbed.embedded import build_model, build_processor
from kepo_core.testbed.lessons import Pool, Tasks
from kepo_core.testbed.pretraining import Kept, Log, Mixture, train_language, train_vision


@dataclass(frozen=True)
class Pupil:
    """A size of ``embedded.build_config``, and for how many lengths of `Lessons` it is trained."""

    size: str
    length: float


PUPILS = {"student": Pupil("small", 1.2), "middle": Pupil("medium", 1.25), "teacher": Pupil("large", 1.3)}


@dataclass(frozen=True)
class Lessons:
    """One length of schooling; phases are (steps, mixture), after ``vision_steps`` of 128 pictures."""

    pictures: int = 24_000
    vision_steps: int = 1200
    phases: tuple[tuple[int, Mixture], ...] = (
        (150, {"lookup": 96, "named": 32}),
        (250, {"lookup": 12, "named": 12, "caption": 16, "ticked": 32, "atlas": 16, "hint": 4, "aware": 16}),
        (600, {"lookup": 4, "named": 4, "ticked": 16, "atlas": 8, "plain": 20, "think": 12, "hint": 6, "aware": 12}),
    )

    def times(self, length: float) -> "Lessons":
        """The lessons, ``length`` times as long; every phase has at least one step."""
        phases = tuple((max(1, round(length * steps)), mixture) for steps, mixture in self.phases)
        return Lessons(self.pictures, max(1, round(length * self.vision_steps)), phases)


def teach(
    pupil: str, seed: int, folder: Path, lessons: Lessons | None = None, log: Log = print, every: int = 100
) -> None:
    """Train one of ``PUPILS`` and write it to ``folder``.

    Everything random follows from ``pupil`` and ``seed``. Until it is done, its state is saved every ``every`` steps
    beside ``folder``, for these lessons and this seed; on one machine, a resumed training ends with the same weights,
    bit for bit.
    """
    chosen = PUPILS[pupil]
    course, own = (lessons or Lessons()).times(chosen.length), zlib.crc32(f"{pupil} {seed}".encode())
    kept = folder.with_name(f"{folder.name}.{zlib.crc32(repr((own, course)).encode()):08x}.kept")
    kept.mkdir(parents=True, exist_ok=True)
    with one_thread():
        processor = build_processor()
        pool = Pool.draw(processor, course.pictures, own)
        log(f"{course.pictures} pictures drawn")
        model = build_model(chosen.size, own).train()
        train_vision(model, pool, course.vision_steps, own, log, Kept(kept / "vision.pt", every))
        tasks = Tasks(processor, pool, np.random.default_rng([2, own]), chosen.length)
        train_language(model, tasks, course.phases, log, Kept(kept / "language.pt", every))
    save_embedded(model.eval(), processor, folder)
    shutil.rmtree(kept)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="kepo_core.testbed.school", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pupil", choices=PUPILS)
    parser.add_argument("folder", type=Path, help="where the model is written")
    parser.add_argument("--seed", type=int, default=0, help="of weights, pictures and lessons, with the pupil's name")
    parser.add_argument("--length", type=float, default=1.0, help="of all schooling: below 1, a trial (default: 1)")
    given = parser.parse_args(arguments)
    teach(given.pupil, given.seed, given.folder, Lessons().times(given.length))


if __name__ == "__main__":
    main()
