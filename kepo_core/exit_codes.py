"""How a process of this package ends."""

import os
import sys
from typing import NoReturn

#: Completed; failed (the folder says why); refused (nothing is left behind); interrupted.
COMPLETED, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


def leave(code: int) -> NoReturn:
    """Exit a process that trained with others, after all have synchronised.

    It skips the interpreter's shutdown and does not destroy the process group: in both, gloo's threads sometimes hang,
    or abort a process whose work is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
