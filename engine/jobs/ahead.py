"""Work that runs beside other work, a few pieces ahead and no more."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

_END = object()
POLL = 0.1  # seconds between looks at whether the other side is still there


def ahead(source: Iterable[T], depth: int, check: Callable[[], None] = lambda: None) -> Iterator[T]:
    """Runs `source` in a thread of its own, at most `depth` pieces ahead of who reads it.

    Args:
      check: called again and again while the reader waits; may raise.

    What `source` raises is raised to the reader, after the pieces before it. When the reader closes this
    generator, or is left by an exception, the thread ends at its next piece and `source` is closed.
    """
    pieces: queue.Queue = queue.Queue(depth)
    left = threading.Event()

    def put(piece: object) -> bool:
        while not left.is_set():
            try:
                pieces.put(piece, timeout=POLL)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        iterator = iter(source)
        try:
            for piece in iterator:
                if not put((piece, None)):
                    return
            put((_END, None))
        except BaseException as error:
            put((_END, error))
        finally:
            if close := getattr(iterator, "close", None):
                close()

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while True:
            try:
                piece, error = pieces.get(timeout=POLL)
            except queue.Empty:
                check()
                continue
            if error is not None:
                raise error
            if piece is _END:
                return
            yield piece
    finally:
        left.set()
        thread.join()
