"""Who may pass when: the gate that drains conversations, and the clock of a busy engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager


class Gate:
    """Lets conversations in, unless it is closed; those under way go on and end.

    ====== ==================================== ==========================
    who    waits for                            woken by
    ====== ==================================== ==========================
    enter  the gate to open                     the end of ``closed``
    closed every conversation under way to end  ``leave`` of the last one
    ====== ==================================== ==========================
    """

    def __init__(self) -> None:
        self._inside: set[object] = set()
        self._open, self._empty = asyncio.Event(), asyncio.Event()
        self._open.set()

    async def enter(self, conversation: object) -> None:
        while conversation not in self._inside and not self._open.is_set():
            await self._open.wait()
        self._inside.add(conversation)

    def leave(self, conversation: object) -> None:
        self._inside.discard(conversation)
        if not self._inside:
            self._empty.set()

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        self._open.clear()
        try:
            while self._inside:
                self._empty.clear()
                await self._empty.wait()
            yield
        finally:
            self._open.set()


class BusyClock:
    """Seconds in which at least one thing was under way."""

    def __init__(self) -> None:
        self._under_way, self._since, self._before = 0, 0.0, 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        if not self._under_way:
            self._since = time.perf_counter()
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._before += time.perf_counter() - self._since

    @property
    def seconds(self) -> float:
        return self._before + (time.perf_counter() - self._since if self._under_way else 0.0)
