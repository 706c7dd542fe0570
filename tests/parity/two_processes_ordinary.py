"""Algorithm 1, then a custom task, on several processes; started by test_processes.py."""

import sys
from pathlib import Path

import two_processes_algorithm_1
import two_processes_text

from kepo_core.exit_codes import leave


def main(output_dir: Path, world_size: int) -> None:
    folders = [output_dir / name for name in ("algorithm_1", "text")]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    two_processes_algorithm_1.main(folders[0], world_size, 30)
    two_processes_text.main(folders[1], world_size)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    leave(0)
