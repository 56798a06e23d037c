"""The next value is made in a thread while the last one is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def prefetch(make: Callable[[int], T], numbers: range) -> Iterator[Iterator[T]]:
    """`make(number)` for each of `numbers`, in order, one ahead of whoever takes them.

    An error of `make` is raised when its value is asked for, not before. The thread ends with the context.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as thread:

        def values() -> Iterator[T]:
            ahead = thread.submit(make, numbers[0]) if numbers else None
            for number in [*numbers[1:], None]:
                if ahead is None:
                    return
                value = ahead.result()
                ahead = None if number is None else thread.submit(make, number)
                yield value

        yield values()
