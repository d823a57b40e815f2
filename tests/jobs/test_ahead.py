"""Work beside other work: order, bounds, errors and endings."""

import threading

import pytest

from engine.jobs.ahead import ahead


def test_all_pieces_in_their_order():
    assert list(ahead(range(1000), 3)) == list(range(1000))


def test_only_so_far_ahead():
    made = []

    def source():
        for i in range(100):
            made.append(i)
            yield i

    pieces = ahead(source(), 3)
    for read in range(1, 30):
        next(pieces)
        # 3 wait in the queue, one is in the producer's hands
        assert len(made) <= read + 4
    pieces.close()


def test_an_error_comes_after_the_pieces_before_it():
    def source():
        yield 1
        raise ValueError("two")

    pieces = ahead(source(), 5)
    assert next(pieces) == 1
    with pytest.raises(ValueError, match="two"):
        next(pieces)


def test_who_leaves_closes_the_source_and_ends_the_thread():
    closed = threading.Event()

    def source():
        try:
            while True:
                yield threading.current_thread()
        finally:
            closed.set()

    pieces = ahead(source(), 2)
    thread = next(pieces)
    assert thread is not threading.current_thread()
    pieces.close()
    assert closed.is_set()
    assert not thread.is_alive()


def test_the_reader_can_be_called_away_while_it_waits():
    never = threading.Event()

    def source():
        never.wait()
        yield 1

    def check():
        never.set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(ahead(source(), 1, check))
