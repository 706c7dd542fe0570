"""How long it takes to read and check a data set as large as OmniMedVQA, and how much memory.

``python tests/bench/reading.py [rows]`` writes a made-up release (default: 89,000 rows in 42 data sets, two of three
rows irregular in one of the known ways) into a temporary folder, and reads it there and as an archive.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from kepo_core.data.check import check
from kepo_core.data.source import QA_FOLDER

MODALITIES = (
    "MR (Mag-netic Resonance Imaging)", "CT(Computed Tomography)", "X-Ray", "ultrasound", "Dermoscopy",
    "Fundus Photography", "OCT (Optical Coherence Tomography", "Microscopy Images",
)  # fmt: skip
TYPES = ("Anatomy Identification", "Disease Diagnosis", "Lesion Grading", "Modality Recognition")


def write_release(root: Path, rows: int, sets: int = 42) -> None:
    """``rows`` questions about two thirds as many pictures; a picture is a single byte, as nothing opens it."""
    (root / QA_FOLDER).mkdir(parents=True)
    for number in range(sets):
        name = f"Set {number} & more"
        folder = root / "Images" / name
        folder.mkdir(parents=True)
        written: list[dict[str, Any]] = []
        for i in range(number, rows, sets):
            picture = folder / f"{i // sets * 2 // 3:06d}..PNG"
            if not picture.exists():
                picture.write_bytes(b"x")
            answer = ("a cyst of the left kidney.", "A cyst of the left kidney", "a cyst of the left  kidney")[i % 3]
            written.append(
                {
                    "dataset": name, "question_id": f"{name}_{i:06d}", "question_type": TYPES[i % 4],
                    "question": "Which of the following is seen in this picture?", "gt_answer": answer,
                    "image_path": str(picture.relative_to(root)), "option_A": "nothing of the kind",
                    "option_B": "a cyst of the left kidney.", "option_C": "a tear (ACJ OA).",
                    **({} if i % 5 else {"option_D": "Nothing of the kind"}), "modality_type": MODALITIES[number % 8],
                }
            )  # fmt: skip
        (root / QA_FOLDER / f"{name}.json").write_text(json.dumps(written))


def measure(root: Path) -> dict[str, float]:
    """Rows, seconds (by the clock, and of a core's work) and peak MiB of `check` in this process."""
    start, busy = time.perf_counter(), time.process_time()
    checked = check(root)
    checked.as_text()
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    # Not getrusage: what that says of a process begins with what its parent had in use.
    (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    found = {"seconds": round(seconds, 2), "of one core": round(busy, 2), "peak MiB": round(int(peak) / 2**10)}
    return {"rows": checked.ledger.read, **found}


def measure_both(rows: int) -> dict[str, dict[str, float]]:
    """Folder and archive, each read by a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "OmniMedVQA"
        write_release(root, rows)
        archive = Path(folder) / "OmniMedVQA.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for path in root.rglob("*"):
                file.write(path, path.relative_to(folder))
        found = {}
        for name, path in {"folder": root, "archive": archive}.items():
            command = [sys.executable, __file__, "--read", str(path)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name] = json.loads(done.stdout)
        return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        print(json.dumps(measure(Path(sys.argv[2]))))
    else:
        print(json.dumps(measure_both(int(sys.argv[1]) if sys.argv[1:] else 89_000), indent=1))
