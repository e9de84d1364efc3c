"""Keep freed memory in the process."""

import ctypes
import platform
from contextlib import suppress


# Numbers of glibc's `mallopt`, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory():
    """Let glibc reuse the memory of freed tensors.

    By default glibc returns the memory of large tensors to the system. Then every new tensor waits for cleared pages,
    which can take more time than the arithmetic. This setting holds for the whole process. Its memory stays at its
    peak. Without glibc nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_MAX, 0)  # all arrays are in the heap
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # the heap does not shrink
