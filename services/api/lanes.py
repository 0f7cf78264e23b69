"""Makes the lanes of an api process: what all of them have from the settings, in one place."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from services.api.batching import Batch, Lane
from services.api.metrics import batch_observer
from shared.config import Settings
from shared.database import connect

Request = TypeVar("Request")
Answer = TypeVar("Answer")


def make_lane(
    settings: Settings,
    name: str,
    make_batch: Callable[[Sequence[Request]], Batch[Answer]],
    *,
    max_batch: int | None = None,
    max_queue: int | None = None,
) -> Lane[Request, Answer]:
    """A lane with a connection of its own; ``name`` is its metrics' label, None stands for the settings' bound."""
    lane = Lane(
        name,
        make_batch,
        functools.partial(connect, settings.mysql, several_statements=True),
        max_batch=settings.max_batch if max_batch is None else max_batch,
        max_queue=settings.max_queue if max_queue is None else max_queue,
        timeout_seconds=settings.request_timeout_seconds,
        observe=batch_observer(name),
    )
    if settings.api_workers < _processors():
        lane.stay_awake()
    return lane


def _processors() -> int:
    """How many this process may use; the store needs one of them while it works."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
