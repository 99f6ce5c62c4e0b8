"""Ctrl-C between two whole states: what moves arrays is not interrupted in the middle."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Held:
    """A `with` block that puts off Ctrl-C from `begin` to its end, where KeyboardInterrupt is raised then.

    Signals reach the main thread alone, and a handler of the caller's that is no Python function (Ctrl-C
    ignored, as under nohup) stays as it is.
    """

    def __init__(self) -> None:
        self._before: Any = None
        self._asked = False

    def __enter__(self) -> Held:
        return self

    def begin(self) -> None:
        """Put off what arrives from now on."""
        before = signal.getsignal(signal.SIGINT)
        if callable(before) and threading.current_thread() is threading.main_thread():
            self._before = before
            signal.signal(signal.SIGINT, self._put_off)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        before = self._before
        if before is None:
            return
        signal.signal(signal.SIGINT, before)
        # an error that ends the block is the news, not the interrupt
        if self._asked and error is None:
            before(signal.SIGINT, None)

    def _put_off(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
