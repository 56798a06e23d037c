"""What asks a run to stop before its last update: SIGTERM, as a scheduler sends it before it takes a machine away, and Ctrl-C.

A run that has begun to train only notes the request, and stops at its next safe point with all that it has done saved
(docs/decisions/0032-stops.md). A Ctrl-C after any request stops it at once.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from trainspec.errors import EXIT_DONE, StoppedError

# What users call the signals.
_WORDS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class StopRequest:
    """Whether this process was asked to stop, and by what; `hear` is the handler of its signals.

    Before `defer` there is nothing to save: a request raises StoppedError wherever the program is. After `end` nobody looks at
    `asked`: a first request ends the program at once.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self.signal: signal.Signals | None = None
        self._is_deferred = False
        self._ending: BaseException | None = None

    def defer(self) -> None:
        """From here on only note a request: who calls this looks at `asked`."""
        self._is_deferred = True

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Inside, a request is noted; it raises StoppedError at the end. An import that is broken off cannot be made again."""
        self.defer()
        yield
        self._is_deferred = False
        if self.asked is not None:
            raise StoppedError(self.asked)

    def end(self, error: BaseException | None) -> None:
        """The run is over, by this error or well. SIGTERM changes nothing of how the program ends, it only ends it now."""
        self._ending = error or SystemExit(EXIT_DONE)

    def hear(self, number: int, _: FrameType | None = None) -> None:
        """Note the first request. Raises KeyboardInterrupt for a Ctrl-C after it; a scheduler may repeat its SIGTERM."""
        if self.asked is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.signal = signal.Signals(number)
        self.asked = _WORDS[self.signal]
        if self._ending is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else self._ending
        if not self._is_deferred:
            raise StoppedError(self.asked)


@contextmanager
def listening(request: StopRequest | None = None, *, is_last: bool = False) -> Iterator[StopRequest]:
    """Inside, SIGTERM and Ctrl-C are requests, noted in `request` where there is one; afterwards they do what they did before.

    `is_last`: afterwards the program only has to end, with a code that is known. A SIGTERM is ignored then, as it would take the
    code's place.

    What listens to the same `request` around this does so after its end. A signal that is ignored, as for a program in a shell's
    background, stays ignored. Outside of the main thread, where Python has no handlers, nothing is heard. A request that comes
    within a callback of the interpreter, which drops exceptions, is looked at later.
    """
    request, before, report = request or StopRequest(), {}, sys.unraisablehook

    def report_others(dropped: Any) -> None:
        if not isinstance(dropped.exc_value, StoppedError | SystemExit):
            report(dropped)

    sys.unraisablehook = report_others
    if threading.current_thread() is threading.main_thread():
        for number in _WORDS:
            # None is a handler that Python did not set, and could not put back.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, request.hear)
    try:
        yield request
        request.end(None)
    except BaseException as error:
        request.end(error)
        raise
    finally:
        sys.unraisablehook = report
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if is_last and number == signal.SIGTERM else handler)
