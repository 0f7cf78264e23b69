"""Start and end of a process: one event loop, named tasks, a stop that drains, an exit code.

The first task that fails ends the process with exit code 1 and its cause in the log, so that the supervisor (Compose,
systemd, the demo) starts it again. SIGTERM and SIGINT set ``stop``: tasks end by themselves within ``DRAIN_SECONDS``;
after that the process is ended. The regular tasks of a process wake at the same tick, once a second, because waking
once costs an idle process less than waking for each task. Each process has its own phase.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import math
import random
import resource
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn

import uvloop

from skipbus.shared.errors import BackendError, OperatorError, StoreUnavailable
from skipbus.shared.logging import get_logger
from skipbus.shared.metrics import TaskAge

DRAIN_SECONDS = 10.0
EXIT_OK = 0
EXIT_FAILED = 1
_PR_SET_DUMPABLE = 4
# New objects between two garbage collections; Python's default is 700.
_COLLECT_AFTER = 10_000
TICK_SECONDS = 1.0
# A tick may be this much later than requested; otherwise the earlier one is used.
_LATENESS_SECONDS = 0.25
# Many processes must not wake at the same time. Whole milliseconds, as the event loop's timers count them.
_PHASE_SECONDS = random.randrange(1000) / 1000  # noqa: S311 -- spreads load, no secret

_log = get_logger("lifecycle")


class Stopped(Exception):
    """Raised inside a task group to end it after a stop was requested."""


def run_service(serve: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> int:
    """Runs ``serve(stop)`` on an event loop until it returns, and returns the exit code of the process."""
    _raise_file_limit()
    _keep_memory_private()
    _collect_less_garbage()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve_until_signalled(serve))
    except KeyboardInterrupt:
        return EXIT_OK
    except BaseException as error:  # noqa: BLE001 -- whatever ended the process, its cause goes into the log
        _log_failure(error)
        return EXIT_FAILED
    return EXIT_OK


def _collect_less_garbage() -> None:
    """Excludes all present objects from garbage collection, because they stay until the end.

    An envelope of thousands of keys is thousands of lists: collecting after every 700 of them, and sometimes through
    all modules, took half of a syncer's time while keys expired.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER)


async def _serve_until_signalled(serve: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    serving = asyncio.create_task(serve(stop), name="serve")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not serving.done():
        _log.info("stopping", drain_seconds=DRAIN_SECONDS)
        await asyncio.wait({serving}, timeout=DRAIN_SECONDS)
    if not serving.done():
        _log.warning("stopped before all work was finished", drain_seconds=DRAIN_SECONDS)
        serving.cancel()
        await asyncio.wait({serving}, timeout=1.0)
        return
    await serving


async def pause(stop: asyncio.Event, seconds: float) -> bool:
    """Waits for ``stop`` or for ``seconds``; returns whether to continue."""
    return await _pause_until(stop, asyncio.get_running_loop().time() + seconds)


async def pause_to_tick(stop: asyncio.Event, seconds: float) -> bool:
    """``pause`` until a tick that is about ``seconds`` away."""
    return await _pause_until(stop, next_tick(asyncio.get_running_loop().time(), seconds))


def next_tick(now: float, seconds: float) -> float:
    """The loop time of the next tick for a task that runs every ``seconds``; below one second there are no ticks."""
    if seconds < TICK_SECONDS:
        return now + seconds
    earliest = now + seconds + _LATENESS_SECONDS - TICK_SECONDS
    tick = _PHASE_SECONDS + TICK_SECONDS * math.ceil((earliest - _PHASE_SECONDS) / TICK_SECONDS)
    # The exact value of the loop's clock at that time, which counts milliseconds.
    return round(tick, 3)


async def _pause_until(stop: asyncio.Event, when: float) -> bool:
    return not await _is_set(stop, when)


async def _is_set(event: asyncio.Event, until: float) -> bool:
    """Waits for the event, at most until that loop time; whether it is set."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(until):
            await event.wait()
    return event.is_set()


async def every(
    stop: asyncio.Event,
    seconds: float,
    what: str,
    action: Callable[[], Awaitable[None]],
    *,
    quiet: bool = False,
    wake: asyncio.Event | None = None,
) -> None:
    """Runs ``action`` every ``seconds``, at a tick, until ``stop``; and when ``wake`` is set, which it clears before.

    A lost database is logged once, and once when it is back; any other error ends the task. ``quiet`` is for tasks
    of a process in which another one logs an unavailable store for all: StoreUnavailable is logged at debug only. The
    task's age, which the probes read, is that of its last success in any case.
    """
    task, loop = _RegularTask(what, seconds, quiet=quiet), asyncio.get_running_loop()
    waking = asyncio.create_task(_set_at_stop(stop, wake), name=f"wake {what}") if wake else None
    due_at, woken = 0.0, False
    try:
        while not stop.is_set():
            if wake:
                wake.clear()
            await task.attempt(action)
            # A wake-up does not put off the next tick.
            if not woken:
                due_at = next_tick(loop.time(), seconds)
            woken = await _is_set(wake or stop, due_at)
    finally:
        if waking:
            waking.cancel()


async def _set_at_stop(stop: asyncio.Event, wake: asyncio.Event) -> None:
    await stop.wait()
    wake.set()


class _RegularTask:
    """One regular task: its attempts, and whether its backend is away."""

    def __init__(self, name: str, seconds: float, *, quiet: bool) -> None:
        self._name = name
        self._quiet = quiet
        self._age = TaskAge(name, seconds)
        self._away = False

    async def attempt(self, action: Callable[[], Awaitable[None]]) -> None:
        """Raises what is not a BackendError."""
        self._age.tried()
        try:
            await action()
        except BackendError as error:
            self._note_away(error)
        else:
            self._note_done()

    def _note_away(self, error: BackendError) -> None:
        if self._quiet and isinstance(error, StoreUnavailable):
            _log.debug("store away", task=self._name, reason=str(error))
            return
        if not self._away:
            _log.warning("database unavailable", task=self._name, reason=str(error))
        self._away = True

    def _note_done(self) -> None:
        if self._away:
            _log.info("database available again", task=self._name)
        self._away = False
        self._age.done()


async def stop_group(stop: asyncio.Event) -> NoReturn:
    """A task for a TaskGroup whose other tasks run forever: ends them all at ``stop``."""
    await stop.wait()
    raise Stopped


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else hard
    if soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _keep_memory_private() -> None:
    """Keys pass through this process's memory: no core dump, and no debugger of the same user (prctl(2))."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _log_failure(error: BaseException) -> None:
    for cause in _leaves(error):
        if isinstance(cause, OperatorError):
            _log.critical("cannot run", reason=str(cause))
        else:
            _log.critical("failed", reason=f"{type(cause).__name__}: {cause}", exc_info=cause)


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]
