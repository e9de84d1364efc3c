"""Run jobs in worker processes."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import parent_process
from typing import Any

from ..models.memory import keep_freed_memory
from ..utils.errors import UserError
from ..utils.processes import obey_parent_only


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))  # the limit of a container or a batch system
    except AttributeError:  # not on macOS or Windows
        return os.cpu_count() or 1


def default_workers(num_processes: int = 1) -> int:
    """Return the number of workers for each process, at most 8."""
    return max(1, min(8, num_cores() // num_processes))


def map_unordered(function: Callable[[Any], Any], jobs: Iterable[Any], num_workers: int) -> Iterator[Any]:
    """Yield `function(job)` for each job, in the order of completion.

    Jobs are drawn on demand: at most two for each worker wait at a time. Workers start by the platform's default
    method, like those of a torch `DataLoader`.

    Args:
        function: Picklable, with picklable results.
        jobs: Picklable.
        num_workers: Number of processes; 0 runs the jobs in this process.

    Raises:
        UserError: If a worker was killed.
        Exception: Any error of `function`; then no further job starts.
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
        yield from (future.result() for future in as_completed(pending))
    except BrokenProcessPool as error:
        what = f"one of the {num_workers} metric workers was killed, probably because memory ran out"
        raise UserError(f"{what}; run with fewer --metric-workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    obey_parent_only()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    keep_freed_memory()
    import cv2

    # OpenCV's threads do not survive a fork: a child process that uses them may hang.
    cv2.setNumThreads(0)


def _end_with_parent():
    """End this worker when its parent ends, even if that was killed."""
    parent_process().join()
    os._exit(1)
