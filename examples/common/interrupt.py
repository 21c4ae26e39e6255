"""Ctrl-C and SIGTERM as a request to stop after the current step."""

import signal
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """The run stopped on request; its checkpoint is saved."""


class StopRequest:
    """While entered, SIGINT and SIGTERM set `requested` instead of ending Python.

    The second signal ends it at once, for whoever does not want to wait.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {n: signal.signal(n, self._handle) for n in self._SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
