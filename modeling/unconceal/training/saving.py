"""Save a run within an epoch; stop it on a signal."""

import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator


SECONDS = {"s": 1, "min": 60, "h": 3600}
# Several processes agree at every so many steps, as each agreement makes them wait for each other.
AGREE_EVERY = 10


def parse_interval(text: str) -> tuple[float, str]:
    """Parse an interval such as 10min, 30s, 2h or 500steps.

    Returns the number and its unit: "seconds" or "steps".

    Raises:
        ValueError: If the text is no interval, or is 0. The message says what was expected.
    """
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(s|min|h|steps?)", text.strip())
    amount = float(found[1]) if found else 0
    if not amount or (found[2].startswith("step") and amount != int(amount)):
        raise ValueError("an interval such as 10min, 30s, 2h or 500steps, or null")
    return (amount, "steps") if found[2].startswith("step") else (amount * SECONDS[found[2]], "seconds")


class Stopped(SystemExit):
    """End of a saved run by a signal.

    The exit code is 128 plus the signal's number.
    """

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number


class StopRequest:
    """Signal that asks a run to save and to stop."""

    def __init__(self):
        self.number = 0  # of the signal

    def __call__(self, number: int, frame):
        """Note a signal; a second one acts at once."""
        if self.number:
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)
        self.number = number


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Note SIGTERM and Ctrl-C for a while, in the main thread."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # Python sets handlers in the main thread only
        return
    # A shell's background job ignores Ctrl-C, and stays so.
    numbers = [one for one in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(one) != signal.SIG_IGN]
    former = {number: signal.signal(number, request) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class SaveSchedule:
    """When to save within an epoch.

    Args:
        every: Interval as for `parse_interval`, or None.
        request: Signal that asks to stop.
        accelerator: The processes, which save together.
    """

    def __init__(self, every: str | None, request: StopRequest, accelerator: Accelerator):
        self.amount, self.unit = parse_interval(every) if every else (float("inf"), "steps")
        self.request, self.accelerator = request, accelerator
        self.steps, self.last = 0, time.monotonic()

    def is_due(self) -> bool:
        """Return whether to save now; all processes call it after each step."""
        self.steps += 1
        passed = self.steps if self.unit == "steps" else time.monotonic() - self.last
        if self.accelerator.num_processes == 1:
            return bool(self.request.number) or passed >= self.amount
        if self.unit == "steps" and passed >= self.amount:
            return True  # the same for all
        if self.steps % AGREE_EVERY:
            return False
        asked = torch.tensor([self.request.number, passed >= self.amount], device=self.accelerator.device)
        number, due = self.accelerator.gather(asked[None]).amax(dim=0).tolist()
        self.request.number = number
        return bool(number or due)

    def saved(self):
        """Start the next interval, or end the run.

        Raises:
            Stopped: If a signal asked to stop.
        """
        self.steps, self.last = 0, time.monotonic()
        if self.request.number:
            name = signal.Signals(self.request.number).name
            self.accelerator.print(f"stopped by {name}; the run is saved, and --resume goes on with it")
            raise Stopped(self.request.number)


__all__ = ["SaveSchedule", "StopRequest", "Stopped", "parse_interval", "stop_on_signals"]
