"""The probes of a container: is the service alive, and is it ready?

Standard library only, so that a probe costs little every few seconds. It asks the process over loopback, never the
store or the broker. Alive: the event loop runs, because some regular task was started recently. Ready: every regular
task succeeded recently, the api's ``/health`` is 200, and the syncer has its broker. A process whose store is down is
alive and not ready: a restart would not help.
"""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Mapping

_LOOPBACK = "127.0.0.1"
_ASK_SECONDS = 3.0
# A task may take long: the janitor's largest batches, or the ten seconds until a statement is given up.
_SLACK_SECONDS = 12.0
_MISSED_INTERVALS = 3
_LINE = re.compile(r"^(skipbus_\w+?)(?:\{task=\"([^\"]*)\"\})? (\S+)$", re.MULTILINE)
# The syncer and the janitor each have one of these from their start.
_NOT_THE_API = frozenset({"skipbus_bus_up", "skipbus_janitor_elected"})

Metrics = dict[tuple[str, str], float]


class Unanswered(Exception):
    """The process did not answer; the message says which request."""


def alive_fault(environ: Mapping[str, str]) -> str | None:
    """Why the service counts as dead, or None."""
    try:
        metrics = _read_metrics(environ)
    except Unanswered as error:
        return f"not alive: {error}"
    ages = _of_tasks(metrics, "skipbus_task_tried_age_seconds")
    limits = _limits(metrics)
    if ages and all(age > limits[task] for task, age in ages.items()):
        return f"not alive: no regular task was started in the last {min(limits.values()):g} s"
    return None


def ready_fault(environ: Mapping[str, str]) -> str | None:
    """Why the service cannot do its work now, or None."""
    fault = alive_fault(environ)
    if fault is not None:
        return fault
    try:
        metrics = _read_metrics(environ)
        faults = [*_late_tasks(metrics), *_service_faults(metrics, environ)]
    except Unanswered as error:
        faults = [str(error)]
    return f"alive, not ready: {'; '.join(faults)}" if faults else None


def _late_tasks(metrics: Metrics) -> list[str]:
    ages = _of_tasks(metrics, "skipbus_task_done_age_seconds")
    if not ages:
        return ["no regular task has finished yet"]
    limits = _limits(metrics)
    return [f"'{task}' has not succeeded lately" for task, age in ages.items() if age > limits[task]]


def _service_faults(metrics: Metrics, environ: Mapping[str, str]) -> list[str]:
    if metrics.get(("skipbus_bus_up", "")) == 0:
        return ["the broker is away, or does not confirm messages"]
    if _NOT_THE_API & {name for name, _ in metrics}:
        return []
    return _health_faults(environ)


def _health_faults(environ: Mapping[str, str]) -> list[str]:
    status, body = _get(_plain_host(environ), int(environ.get("SKIP_PORT", "8080")), "/health")
    if status == 200:
        return []
    try:
        faults = json.loads(body)["faults"]
    except (ValueError, KeyError, TypeError):
        faults = []
    return [str(fault) for fault in faults] or [f"/health answered {status}"]


def _plain_host(environ: Mapping[str, str]) -> str:
    """The address of the api's plain port: loopback, unless the operator chose another one."""
    host = environ.get("SKIP_HOST", _LOOPBACK)
    opened = environ.get("SKIP_ALLOW_PLAINTEXT", "false").lower() in ("true", "1", "yes")
    return host if opened and host not in ("0.0.0.0", "::") else _LOOPBACK  # noqa: S104 -- compared with, not bound


def _read_metrics(environ: Mapping[str, str]) -> Metrics:
    port = int(environ.get("SKIP_METRICS_PORT", "0"))
    if port == 0:
        raise Unanswered("SKIP_METRICS_PORT is not set: probes need it")
    status, body = _get(_LOOPBACK, port, "/metrics")
    if status != 200:
        raise Unanswered(f"the metrics answered {status}")
    return {(name, task): float(value) for name, task, value in _LINE.findall(body.decode(errors="replace"))}


def _of_tasks(metrics: Metrics, name: str) -> dict[str, float]:
    return {task: value for (found, task), value in metrics.items() if found == name}


def _limits(metrics: Metrics) -> dict[str, float]:
    """The largest allowed age (s) of each task's last run."""
    intervals = _of_tasks(metrics, "skipbus_task_interval_seconds")
    return {task: _MISSED_INTERVALS * seconds + _SLACK_SECONDS for task, seconds in intervals.items()}


def _get(host: str, port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(host, port, timeout=_ASK_SECONDS)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read(1 << 20)
    except (OSError, http.client.HTTPException) as error:
        raise Unanswered(f"{path} on port {port} did not answer ({type(error).__name__})") from error
    finally:
        connection.close()
