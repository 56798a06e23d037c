"""Prepares the next value in a thread while the current one is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
# How often it is looked whether a value is still waited for.
_POLL_SECONDS = 0.1


@contextmanager
def prefetch(
    make: Callable[[int], T], numbers: range, *, waiting: Callable[[], None] = lambda: None
) -> Iterator[Iterator[T]]:
    """An iterator over `make(number)` for `numbers`, computed one ahead in a thread that ends with the context.

    An error of `make` is raised when its value is taken, not before. `waiting` is called again and again while a value is
    waited for, and may raise to give it up.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as thread:

        def taken(ahead: Future[T]) -> T:
            while not wait([ahead], timeout=_POLL_SECONDS).done:
                waiting()
            return ahead.result()

        def values() -> Iterator[T]:
            ahead = thread.submit(make, numbers[0]) if numbers else None
            for number in [*numbers[1:], None]:
                if ahead is None:
                    return
                value = taken(ahead)
                ahead = None if number is None else thread.submit(make, number)
                yield value

        yield values()
