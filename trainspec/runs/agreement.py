"""What the processes of a run agree on before every update and every save: to stop, to save, or to end with an error.

One process may be asked to stop, or fail to write its part of a checkpoint, an update before the others know of it. If it
acted alone, the others would wait for it in their next collective.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from trainspec.errors import MachineError, StoppedError
from trainspec.runs.processes import Processes
from trainspec.runs.stops import StopRequest


@dataclass(frozen=True)
class _Word:
    """What one process has to say: what asked it to stop, whether a checkpoint is due, how its last save failed."""

    asked: str | None = None
    is_due: bool = False
    failure: str | None = None

    def text(self) -> str:
        """As text: empty, as it mostly is, where there is nothing to say."""
        return json.dumps(asdict(self)) if self != _Word() else ""


def _read(text: str) -> _Word:
    return _Word(**json.loads(text)) if text else _Word()


class Agreement:
    """Decides for all processes of a run at the same points; its methods are collectives where there are several.

    `failure` is the text of a save of this process that has failed, `check` raises its error. With `minutes` a checkpoint is
    due that long after the last one was begun, by the leader's clock.
    """

    def __init__(
        self,
        processes: Processes | None = None,
        stop: StopRequest | None = None,
        *,
        failure: Callable[[], str | None] = lambda: None,
        check: Callable[[], None] = lambda: None,
        minutes: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._processes, self._stop = processes or Processes(), stop or StopRequest()
        self._failure, self._check = failure, check
        self._minutes, self._now = minutes, now
        self._saved_at = now()
        self.is_due = False

    @property
    def is_alone(self) -> bool:
        """Whether there is one process only."""
        return self._processes.count == 1

    def go_on(self, step: int) -> None:
        """Agree after update `step`; `is_due` then says whether a checkpoint is due after the next one.

        Raises the error of a save that has failed, on every process, and StoppedError where one was asked to stop.
        """
        self._stop.defer()
        words = self._exchanged(_Word(self._stop.asked, self._is_time(), self._failure()))
        if words[self._processes.index].failure is not None:
            self._check()
        _raise_failures(words)
        asked = _asked(words)
        if asked is not None:
            raise StoppedError(asked, step)
        self.is_due = words[0].is_due

    def look(self, step: int) -> None:
        """What `go_on` does where this process was asked to stop, and else nothing: for those who wait to call it."""
        if self._stop.asked is not None:
            self.go_on(step)

    def finish(self, work: Callable[[], None]) -> None:
        """Do work that is no collective, such as waiting for a save, and return when all processes have done theirs.

        Raises the error of one, on every process.
        """
        failed: Exception | None = None
        try:
            work()
        except Exception as error:  # raised when all know of it
            failed = error
        words = self._exchanged(
            _Word(failure=None if failed is None else str(failed) or type(failed).__name__)
        )
        if failed is not None:
            raise failed
        _raise_failures(words)

    def is_stopping(self) -> bool:
        """Whether one of the processes was asked to stop, so that nothing but saving is to be begun."""
        return _asked(self._exchanged(_Word(self._stop.asked))) is not None

    def saved(self) -> None:
        """A checkpoint was begun: the minutes count from here."""
        self._saved_at = self._now()

    def _is_time(self) -> bool:
        """Whether a checkpoint is due, by the leader's clock."""
        since = self._now() - self._saved_at
        return self._processes.is_leader and self._minutes is not None and since >= 60 * self._minutes

    def _exchanged(self, mine: _Word) -> list[_Word]:
        return [mine] if self.is_alone else [_read(text) for text in self._processes.exchange(mine.text())]


def _raise_failures(words: list[_Word]) -> None:
    for process, word in enumerate(words):
        if word.failure is not None:
            raise MachineError(
                f"process {process} of {len(words)} could not save its part of a checkpoint: {word.failure}"
            )


def _asked(words: list[_Word]) -> str | None:
    return next((word.asked for word in words if word.asked is not None), None)
