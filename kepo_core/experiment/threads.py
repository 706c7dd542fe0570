"""Threads for models so small that two of them mostly wait for each other: one, and further cores for other questions.

Measured with the embedded models (1.2 million parameters each) on two cores: a second thread saves a fifth of the time
while nothing else runs. Beside two busy processes it costs fifty times as much: a thread that has lost its turn
holds up the other at each of thousands of small steps. Results depend on the number of threads in their last bits, so
the models alone decide it: with small ones, ``OMP_NUM_THREADS`` and the machine's load change no result.
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

#: Models with fewer parameters together compute on the CPU with one thread.
FEW = 10_000_000
#: Most processes that answer at the same time: each holds the activations of a batch.
TOGETHER = 4
#: Seconds that forks get to finish, at least, when this process has done its share.
PATIENCE = 60.0

#: The number of threads that `suit_threads` has replaced: that of ``OMP_NUM_THREADS``, else of the cores.
_replaced: int | None = None


def suit_threads(*models: nn.Module) -> None:
    """Let torch compute with one thread if ``models``, together, are small and on the CPU; else undo that."""
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
    """Let torch compute with one thread for a while."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def idle_cores() -> int:
    """How many processes of one thread may answer at once, this one included: the cores that `suit_threads` left."""
    return min(_replaced or 1, TOGETHER) if sys.platform == "linux" else 1  # macOS's libraries do not survive a fork


def with_forks(work: Callable[[int], object], of: int) -> None:
    """Do ``work(0)`` here and ``work(1)`` to ``work(of - 1)`` in forks of this process, which share its memory.

    What a fork leaves undone is the caller's: one may fail or, if another thread held a lock when it was made, wait
    for ever. So none outlives this call, which waits for them as long again as ``work(0)`` took, `PATIENCE` at least.
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it through its starter, as a kill
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_starter, daemon=True).start()
    work(number)


def _end_with_starter() -> None:
    starter = multiprocessing.parent_process()
    assert starter is not None
    starter.join()
    os._exit(1)
