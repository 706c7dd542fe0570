"""How a process of this package ends."""

import os
import sys
from typing import NoReturn

#: Completed; failed, and the folder says why; refused, and nothing is left behind; interrupted.
COMPLETED, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


def leave(code: int) -> NoReturn:
    """End a process that trained with others, after they have waited for one another.

    Not by the interpreter's end, nor by destroying the group of processes: there gloo's threads now and then hang, or
    abort a process whose work is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
