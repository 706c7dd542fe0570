"""Version 4's models: a student, a middle one and a teacher, each from its own seed, of the same lessons.

``python -m kepo_core.testbed.school PUPIL FOLDER`` teaches one of them on one thread, and goes on where it was cut off.
They differ in size and in the length of their schooling, in nothing else: no weights are copied, no habit is taught.
What they know of a modality is what its lessons reach (``lessons.PACE``); what they see, what its pictures show
(``phantom_render.SIGHTS``).
"""

import argparse
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kepo_core.experiment.models import save_embedded
from kepo_core.experiment.threads import one_thread
from kepo_core.testbed.embedded import build_model, build_processor
from kepo_core.testbed.lessons import BOOKS, Pool, Tasks
from kepo_core.testbed.pretraining import Kept, Log, Mixture, train_language, train_vision

VERSION = "4"


@dataclass(frozen=True)
class Pupil:
    """A size of ``embedded.build_config``, and how long it goes to school, in lengths of the student's time there."""

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
        """The same lessons, so many times as long; every phase has a step at least."""
        phases = tuple((max(1, round(length * steps)), mixture) for steps, mixture in self.phases)
        return Lessons(self.pictures, max(1, round(length * self.vision_steps)), phases)


def teach(
    pupil: str, seed: int, folder: Path, lessons: Lessons | None = None, log: Log = print, every: int = 100
) -> None:
    """Teach one of ``PUPILS`` and write it to ``folder``; ``every`` so many steps its state goes to ``folder``.kept.

    Everything random follows from ``pupil`` and ``seed``. What was cut off goes on from the state that is kept, and
    ends with the same weights, bit for bit, on one machine.
    """
    kept = folder.with_name(folder.name + ".kept")
    kept.mkdir(parents=True, exist_ok=True)
    course, size = (lessons or Lessons()).times(PUPILS[pupil].length), PUPILS[pupil].size
    own = zlib.crc32(f"{pupil} {seed}".encode())
    with one_thread():
        processor = build_processor()
        pool = Pool.draw(processor, course.pictures, own, VERSION)
        log(f"{course.pictures} pictures drawn")
        model = build_model(size, own).train()
        train_vision(model, pool, course.vision_steps, own, log, Kept(kept / "vision.pt", every))
        tasks = Tasks(processor, pool, BOOKS, np.random.default_rng([2, own]), PUPILS[pupil].length)
        train_language(model, tasks, course.phases, log, kept=Kept(kept / "language.pt", every))
    save_embedded(model.eval(), processor, folder)


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
