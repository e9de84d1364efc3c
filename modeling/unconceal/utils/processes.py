"""Let processes of a job end in order."""

import os
import signal
import threading


def obey_parent_only(_: int = 0):
    """Let a helping process end by a SIGTERM of its parent only.

    The SIGTERM of a batch system reaches all processes, and the parent needs its helpers until it has saved.
    The argument is the number of a loader's process.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_parent, daemon=True).start()


def _await_parent():
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
