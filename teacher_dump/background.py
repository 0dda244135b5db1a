"""Threads beside the teacher: one that does jobs in order, one that makes the next thing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


class Background:
    """Jobs run one after another in one thread; `put` waits while `waiting` of them are queued.

    A job that fails ends it: its exception is raised by the next `put`, or by `close`. Left by an exception (Ctrl-C
    among them), the job that runs is finished and those that wait are dropped.

    A signal's exception may come at any instruction. In the midst of threading.Condition, and so of queue.Queue, it can
    cost the other thread a wake-up, and both then wait forever; SimpleQueue is one step, or none.
    """

    def __init__(self, waiting: int = 4):
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()  # an item for each job that may still be put
        for _ in range(waiting):
            self._room.put(None)
        self._failure: BaseException | None = None
        self._dropping = False
        self._thread = threading.Thread(target=self._work, name="predistill-writer", daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], None]) -> None:
        self._raise()
        self._room.get()
        self._jobs.put(job)

    def close(self) -> None:
        """Wait for what was put. Raises what a job raised; a second close does nothing."""
        self._jobs.put(None)
        self._thread.join()
        self._raise()

    def drop(self) -> None:
        """Stop after the job that runs."""
        self._dropping = True
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._failure is None and not self._dropping:
                try:
                    job()
                except BaseException as error:  # handed to the caller, KeyboardInterrupt too
                    self._failure = error
            self._room.put(None)

    def _raise(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            self._dropping = True
            raise failure

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self.drop()


class Ahead(Generic[Item, Made]):
    """Iterates over (item, `make(item)`), one made in a thread beside the one in use; the first begins at once.

    Items are asked for in that thread, one at a time. Nobody waits for what is no longer wanted: an interrupted dump
    ends while its next shard is still tokenised.
    """

    def __init__(self, make: Callable[[Item], Made], items: Iterable[Item]):
        self._make, self._items = make, iter(items)
        self._next = self._start()

    def __iter__(self) -> Iterator[tuple[Item, Made]]:
        while (made := self._next.result()) is not None:
            self._next = self._start()
            yield made

    def any(self) -> bool:
        """Is there something more? Waits until it is made."""
        return self._next.result() is not None

    def _start(self) -> Future[tuple[Item, Made] | None]:
        made: Future[tuple[Item, Made] | None] = Future()
        threading.Thread(target=self._fill, args=(made,), name="predistill-tokenizer", daemon=True).start()
        return made

    def _fill(self, made: Future[tuple[Item, Made] | None]) -> None:
        try:
            for item in self._items:
                made.set_result((item, self._make(item)))
                return
            made.set_result(None)
        except BaseException as error:  # raised where the result is asked for
            made.set_exception(error)
