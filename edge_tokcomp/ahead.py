"""Items made ahead of who takes them, in a thread of their own, or just when they are taken."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Supply(Protocol[T_co]):
    """Items in order, one at a time."""

    def take(self, wait: bool) -> T_co | None:
        """The next item; None where it is not made yet and the taker does not ``wait``. Raises ``StopIteration`` after
        the last, and what making an item raised."""

    def close(self) -> None:
        """No more are wanted; one that is being made is waited for."""


class Ahead(Generic[T]):
    """What ``items`` gives, taken from it by a thread: at most ``depth`` wait to be taken, so that it goes no faster
    than its taker."""

    def __init__(self, items: Iterable[T], depth: int, name: str) -> None:
        if depth < 1:
            raise ValueError(f"depth must be 1 or more, got {depth}")
        self._items, self._depth = iter(items), depth
        self._ready: deque[T] = deque()
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._fill, name=name, daemon=True)
        self._thread.start()

    def take(self, wait: bool) -> T | None:
        with self._changed:
            while wait and not (self._ready or self._ended):
                self._changed.wait()
            if self._ready:
                item = self._ready.popleft()
                self._changed.notify_all()
                return item
            if not self._ended:
                return None
            fault, self._fault = self._fault, None
        if fault is not None:
            raise fault
        raise StopIteration

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item = self.take(wait=True)
        if item is None:
            raise ValueError("None is no item of a supply")
        return item

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _fill(self) -> None:
        try:
            for item in self._items:
                with self._changed:
                    while len(self._ready) >= self._depth and not self._closed:
                        self._changed.wait()
                    if self._closed:
                        return
                    self._ready.append(item)
                    self._changed.notify_all()
        except BaseException as fault:  # noqa: BLE001 -- the taker raises it
            self._fault = fault
        finally:
            # What feeds a chain of these ends with it.
            close = getattr(self._items, "close", None)
            if close is not None:
                close()
            with self._changed:
                self._ended = True
                self._changed.notify_all()


class AtOnce(Generic[T]):
    """What ``items`` gives, made when it is taken, whether the taker would wait or not."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items = iter(items)

    def take(self, wait: bool) -> T | None:
        return next(self._items)

    def close(self) -> None:
        close = getattr(self._items, "close", None)
        if close is not None:
            close()
