"""The copy that a save takes: in memory of its own, in that of the save before, and whole."""

import mmap
import threading

import ml_dtypes
import numpy as np
import pytest

import trainspec.checkpoints.copies as copies_module
from trainspec.checkpoints.copies import Copies

RNG = np.random.default_rng(0)
ARRAYS = {
    "large": RNG.normal(size=(1200, 1024)).astype(np.float32),  # more than a thread copies at a time
    "transposed": RNG.normal(size=(300, 200)).T,
    "bfloat16": RNG.normal(size=(64, 32)).astype(ml_dtypes.bfloat16),
    "number": np.array(3.0),
    "empty": np.empty((0, 3), np.float32),
    **{f"small {i}": RNG.normal(size=(7, i)) for i in range(1, 60)},
}


def copied(copies: Copies, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with copies.filling() as copy:
        return {name: copy(array) for name, array in arrays.items()}


def test_copies_are_whole_and_do_not_change_with_the_arrays():
    changing = {name: np.array(array) for name, array in ARRAYS.items()}
    found = copied(Copies(), changing)
    for array in changing.values():
        array[...] = -1
    for name, array in ARRAYS.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_the_next_copies_are_in_the_same_memory():
    copies = Copies()
    first = copied(copies, ARRAYS)
    second = copied(copies, {name: array + np.ones((), array.dtype) for name, array in ARRAYS.items()})
    for name, array in ARRAYS.items():
        assert np.shares_memory(first[name], second[name]) == bool(array.size), name
        np.testing.assert_array_equal(second[name], array + np.ones((), array.dtype), err_msg=name)


def test_arrays_of_other_sizes_get_other_memory():
    copies = Copies()
    first = copied(copies, {"a": np.zeros(8), "b": np.zeros(8)})
    second = copied(copies, {"a": np.ones(9), "b": np.ones(8), "c": np.ones(8)})
    assert not np.shares_memory(first["a"], second["a"])
    assert all((array == 1).all() for array in second.values())


def test_what_is_released_is_not_used_again():
    """Negative control of the sharing above."""
    copies = Copies()
    first = copied(copies, {"a": np.zeros(8)})
    copies.release()
    second = copied(copies, {"a": np.ones(8)})
    assert not np.shares_memory(first["a"], second["a"])


def test_the_memory_is_made_before_it_is_needed(monkeypatch):
    touched = []
    monkeypatch.setattr("trainspec.checkpoints.copies._touch", touched.extend)
    copies = Copies()
    copies.make_room(array.nbytes for array in ARRAYS.values())
    found = copied(copies, ARRAYS)
    assert len(touched) == len(ARRAYS)
    for place, (name, array) in zip(touched, ARRAYS.items(), strict=True):
        assert np.shares_memory(place, found[name]) == bool(array.size), name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_every_page_of_it_is_written_to():
    places = [np.ones(size, np.uint8) for size in (0, 1, 5 * mmap.PAGESIZE + 7)]
    copies_module._touch(places)
    for place in places:
        assert not place[:: mmap.PAGESIZE].any()
        assert len(place) - np.count_nonzero(place) == -(
            -len(place) // mmap.PAGESIZE
        )  # control: and to no more


def test_a_copy_waits_for_its_memory(monkeypatch):
    """What is written to a page afterwards would be in the copy."""
    is_asked, order = threading.Event(), []

    def touch(places):
        is_asked.wait(60)
        order.append("memory")

    monkeypatch.setattr("trainspec.checkpoints.copies._touch", touch)
    copies = Copies()
    copies.make_room([8])
    threading.Timer(0.05, is_asked.set).start()
    with copies.filling():
        order.append("copies")
    assert order == ["memory", "copies"]


def test_an_error_of_a_thread_is_raised(monkeypatch):
    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr("trainspec.checkpoints.copies.copy_into", fail)
    with pytest.raises(MemoryError, match="no room"):
        copied(Copies(), {"a": np.zeros(8)})
