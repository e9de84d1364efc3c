"""Work ahead in threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def map_ahead(function: Callable[[Any], Any], items: Iterable[Any], num_threads: int) -> Iterator[Any]:
    """Yield `function(item)` for each item, in order.

    Threads compute `num_threads` results ahead of the caller. Items are drawn in the caller's thread, on demand. An
    error is raised in its turn; then no further call starts. With 0 threads this is `map`.
    """
    if num_threads == 0:
        yield from map(function, items)
        return
    pool, pending = ThreadPoolExecutor(num_threads), deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
