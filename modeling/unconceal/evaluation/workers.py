"""Work on pictures in processes of its own, beside the work that makes them."""

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import parent_process
from typing import Any

from ..utils.errors import UserError


def default_workers(num_processes: int = 1) -> int:
    """Return how many workers each of some processes can have on this machine, at most 8."""
    try:
        num_cores = len(os.sched_getaffinity(0))  # what a container or a batch system allows
    except AttributeError:  # not on macOS or Windows
        num_cores = os.cpu_count() or 1
    return max(1, min(8, num_cores // num_processes))


def map_unordered(function: Callable[[Any], Any], jobs: Iterable[Any], num_workers: int) -> Iterator[Any]:
    """Yield `function(job)` for each job, in the order in which they are done.

    Jobs are drawn as they are needed: at most two for each worker wait at a time. Workers start as those of a torch
    `DataLoader` do, by the platform's own method.

    Args:
        function: Can be pickled, as can its results.
        jobs: Can be pickled.
        num_workers: Processes; with 0 the work is done here, job by job.

    Raises:
        UserError: If a worker is ended from outside.
        Exception: Whatever `function` raises; then no further job begins.
    """
    if num_workers == 0:
        yield from map(function, jobs)
        return
    pool = ProcessPoolExecutor(num_workers, initializer=_start_worker)
    try:
        pending = set()
        for job in jobs:
            pending.add(pool.submit(function, job))
            if len(pending) >= 2 * num_workers:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool:
        raise UserError(
            f"one of the {num_workers} metric workers was ended from outside, most likely for want of memory; run with "
            "fewer --metric-workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for the results
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _keep_freed_memory()
    import cv2

    # OpenCV's threads do not survive a fork: a child that uses them may wait forever.
    cv2.setNumThreads(0)


def _end_with_parent():
    """Do not outlive a parent that was killed: nobody would ever send a job, or an end."""
    parent_process().join()
    os._exit(1)


def _keep_freed_memory():
    """Have glibc, where it is, reuse the memory of large arrays instead of handing it back after each.

    Fetched anew, each page is cleared first, which takes several workers a tenth of their time and holds each other up.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no array lies apart from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
