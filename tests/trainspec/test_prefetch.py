"""The next value is made while the last one is used; its error comes when it is due; its thread ends with the run."""

import threading

import pytest

from trainspec.training.prefetch import prefetch


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_values_come_in_order_and_one_ahead():
    made: list[int] = []
    ready = {number: threading.Event() for number in range(2, 6)}

    def make(number: int) -> int:
        made.append(number)
        ready[number].set()
        return 10 * number

    with prefetch(make, range(2, 6)) as values:
        assert not made  # nothing is made before it is asked for
        for number, value in zip(range(2, 6), values, strict=True):
            assert value == 10 * number
            if number < 5:
                assert ready[number + 1].wait(10)
            assert made == list(range(2, min(number + 2, 6)))  # one ahead, and no more
    assert threads() == []


def test_nothing_is_made_of_an_empty_range():
    with prefetch(lambda number: 1 // 0, range(3, 3)) as values:
        assert list(values) == []
    assert threads() == []


def test_an_error_is_raised_when_its_value_is_due():
    def make(number: int) -> int:
        if number == 3:
            raise ValueError(f"value {number}")
        return number

    used: list[int] = []
    with pytest.raises(ValueError, match="value 3"), prefetch(make, range(10)) as values:
        used.extend(values)
    assert used == [0, 1, 2]
    assert threads() == []


def test_the_thread_ends_where_the_user_of_the_values_fails():
    def use() -> None:
        with prefetch(lambda number: number, range(10)) as values:
            next(values)
            assert threads()
            raise RuntimeError("an update")

    with pytest.raises(RuntimeError, match="an update"):
        use()
    assert threads() == []
