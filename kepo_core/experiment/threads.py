"""One thread for small models, whose threads mostly wait for each other; further cores answer other questions.

Measured with the embedded models (1.2 million parameters each) on two cores: a second thread saves a fifth of the time
while nothing else runs. Beside two busy processes it takes fifty times as long: a thread that is descheduled delays the
other one at each of thousands of small steps. Results depend on the number of threads in their last bits, so only the
models decide it: with small ones, ``OMP_NUM_THREADS`` and the machine's load change no result.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

#: Models that have fewer parameters in total compute on the CPU with one thread.
FEW = 10_000_000
#: Most processes that answer at the same time: each has the activations of a batch in memory.
TOGETHER = 4
#: Minimum seconds to wait for forks after this process has done its share.
PATIENCE = 60.0

#: The number of threads before `suit_threads` changed it: ``OMP_NUM_THREADS``, or the number of cores.
_replaced: int | None = None


def suit_threads(*models: nn.Module) -> None:
    """Let torch compute with one thread if ``models`` are small in total and on the CPU; otherwise undo that."""
    global _replaced
    weights = [tensor for model in models for tensor in model.parameters()]
    on_cpu = all(tensor.device.type in ("cpu", "meta") for tensor in weights)
    if on_cpu and sum(tensor.numel() for tensor in weights) < FEW:
        _replaced = _replaced or torch.get_num_threads()
        torch.set_num_threads(1)
    elif _replaced is not None:
        torch.set_num_threads(_replaced)
        _replaced = None


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread inside the context."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def idle_cores() -> int:
    """Number of one-thread processes, this one included, that may answer at once: the cores freed by `suit_threads`."""
    return min(_replaced or 1, TOGETHER) if sys.platform == "linux" else 1  # macOS's libraries do not survive a fork


def with_forks(work: Callable[[int], object], of: int) -> None:
    """Do ``work(0)`` here and ``work(1)`` to ``work(of - 1)`` in forks of this process, which share its memory.

    The caller must do work that a fork leaves undone: a fork may fail or, if another thread held a lock when it was
    made, hang. This call waits for the forks as long as ``work(0)`` took, at least `PATIENCE`, and then kills them.
    """
    context, began = multiprocessing.get_context("fork"), time.monotonic()
    forks = [context.Process(target=_in_fork, args=(work, number), daemon=True) for number in range(1, of)]
    try:
        for fork in forks:
            fork.start()
        work(0)
        until = time.monotonic() + max(PATIENCE, time.monotonic() - began)
        for fork in forks:
            fork.join(max(0.0, until - time.monotonic()))
    finally:
        for fork in forks:
            if fork.pid is not None:
                fork.kill()
                fork.join()


def _in_fork(work: Callable[[int], object], number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C its parent kills it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_starter, daemon=True).start()
    work(number)


def _end_with_starter() -> None:
    starter = multiprocessing.parent_process()
    assert starter is not None
    starter.join()
    os._exit(1)
