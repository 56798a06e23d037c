"""Prepares the next value in a thread while the current one is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def prefetch(make: Callable[[int], T], numbers: range) -> Iterator[Iterator[T]]:
    """An iterator over `make(number)` for `numbers`, computed one ahead in a thread that ends with the context.

    An error of `make` is raised when its value is taken, not before.
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
