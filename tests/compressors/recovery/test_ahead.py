"""Batches that are made one ahead."""

import threading
import time

import pytest
from compress.compressors.recovery.ahead import one_ahead


def test_one_is_made_while_the_one_before_is_used():
    begun = {index: threading.Event() for index in range(5)}

    def make(index):
        begun[index].set()
        return index * index

    for index, value in one_ahead(make, range(5)):
        assert value == index * index
        assert index == 4 or begun[index + 1].wait(10)
        time.sleep(0.02)
        assert not any(begun[later].is_set() for later in range(index + 2, 5))
    assert list(one_ahead(make, [])) == []
    assert list(one_ahead(make, [3])) == [(3, 9)]


def test_an_error_comes_in_its_turn():
    def make(index):
        if index == 2:
            raise KeyboardInterrupt(index)
        return index

    seen = []
    with pytest.raises(KeyboardInterrupt):
        for index, _ in one_ahead(make, range(5)):
            seen.append(index)
    assert seen == [0, 1]
