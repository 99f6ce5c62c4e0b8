"""How long a call takes on a GPU, by its own clock; the same for every array library.

Each call is timed alone, between two events, after a buffer larger than the L2 cache was overwritten: nothing
that it reads is in the cache. The overwriting goes on until the host has issued the call, so that neither
Python nor a launch is in the time; what waits for the device in the middle of a call is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

FLUSHED_BYTES = 256 * 2**20  # five times the L2 cache of an H100
_WARM_UP = 5
_MOST_FLUSHES = 100


class Device(Protocol):
    """A stream of a GPU, as one array library shows it."""

    def mark(self) -> Any:
        """Return an event that the stream reaches after all that it was given so far."""

    def seconds(self, start: Any, stop: Any) -> float:
        """Wait for `stop`; return the time from `start` to it."""

    def flush(self) -> None:
        """Overwrite `FLUSHED_BYTES` bytes."""

    def wait(self) -> None:
        """Wait for all that the stream was given so far."""


def device_seconds(call: Callable[[], Any], device: Device, runs: int) -> list[float]:
    """Return the time of each of `runs` calls, after some that warm up."""
    flushes = _flushes(call, device)
    return [_once(call, device, flushes) for _ in range(runs)]


def _once(call: Callable[[], Any], device: Device, flushes: int) -> float:
    for _ in range(flushes):
        device.flush()
    start = device.mark()
    call()
    return device.seconds(start, device.mark())


def _flushes(call: Callable[[], Any], device: Device) -> int:
    """Warm up; return how many flushes keep the device busy for twice as long as the host issues `call`."""
    issued = math.inf
    for _ in range(_WARM_UP):
        device.wait()
        start = time.perf_counter()
        call()
        issued = min(issued, time.perf_counter() - start)
    device.flush()
    one = _once(device.flush, device, 1)
    return min(_MOST_FLUSHES, 1 + math.ceil(2 * issued / one))
