"""Many coroutines at once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

_T = TypeVar("_T")


async def gather_all(coroutines: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Run all at once; the first error cancels the rest and is raised as itself."""
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def to_its_end(coroutine: Coroutine[Any, Any, _T], seconds: float) -> _T:
    """Its result. A cancellation meanwhile is raised when it has ended, after ``seconds`` more at most."""
    task = asyncio.ensure_future(coroutine)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task], timeout=seconds)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise
