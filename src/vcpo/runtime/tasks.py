"""Work that others may end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any


async def unless(others: Sequence[Awaitable[Any]], work: asyncio.Task[Any]) -> Any:
    """The result of ``work``, unless one of the others ends first, with an error: ``work`` is cancelled then.
    In the end all of them are."""
    watching = [asyncio.ensure_future(other) for other in others]
    try:
        await asyncio.wait([work, *watching], return_when=asyncio.FIRST_COMPLETED)
        for watcher in watching:
            if watcher.done():
                await watcher
        return await work
    finally:
        for task in (work, *watching):
            task.cancel()
        await asyncio.gather(work, *watching, return_exceptions=True)
