"""The same map on one machine's processes or on a Ray cluster: an item is a task, and what it has done is marked by the
files it leaves.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dreamlip_train.jobs.process_pool import map_bounded
from dreamlip_train.jobs.user_error import RunError, UserError

_WAITING_PER_CPU = 4
_WAIT_SECONDS = 1.0


def map_tasks(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    *,
    ray_address: str = "",
    processes: int = 0,
    gpus_if_any: int = 0,
    on_wait: Callable[[], None] = lambda: None,
) -> Iterator[Any]:
    """``map(function, items)``: on forked processes in order, or with ``ray_address`` on that cluster in the order in
    which tasks end.

    On Ray a task whose worker dies is run again, up to 5 times, on any node: ``function`` must bear that,
    and its files must lie on storage that all nodes share.

    Args:
        ray_address: of a running cluster ("auto" finds the one of this machine); needs the ``ray`` extra.
        gpus_if_any: GPUs a task takes on a cluster that has some.
        on_wait: called while tasks run there, at least every second, and before what ended ones returned is yielded.
    Raises:
        UserError: ray is not installed, or there is no cluster at that address.
    """
    if not ray_address:
        yield from map_bounded(function, items, processes)
        return
    ray = _connect(ray_address)
    resources = ray.cluster_resources()
    task = ray.remote(max_retries=5, num_gpus=gpus_if_any if resources.get("GPU") else 0)(_callable(function))
    room = _WAITING_PER_CPU * max(1, int(resources.get("CPU", 1)))
    running: list[Any] = []
    for item in items:
        while len(running) >= room:
            ready, running = _wait(ray, running, on_wait)
            yield from _results(ray, ready)
        running.append(task.remote(item))
    while running:
        ready, running = _wait(ray, running, on_wait)
        yield from _results(ray, ready)


def _wait(ray: Any, running: list[Any], on_wait: Callable[[], None]) -> tuple[list[Any], list[Any]]:
    """(tasks that have ended, if any, tasks that run) within a second."""
    ready, running = ray.wait(running, timeout=_WAIT_SECONDS)
    on_wait()
    return ready, running


def _results(ray: Any, ready: list[Any]) -> list[Any]:
    """What tasks returned; a user's error is raised as itself, without the traceback that Ray makes part of its
    message.
    """
    try:
        return ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError | RunError):
            raise error.cause from None
        raise


def _callable(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A plain function, which alone Ray takes, of any callable."""

    def run(item: Any) -> Any:
        return function(item)

    return run


def _connect(address: str) -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "--ray: ray is not installed; pip install 'dreamlip[ray]', or leave --ray out to use this machine's cores"
        ) from error
    if not ray.is_initialized():
        try:
            _require_listener(address)
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"--ray: no cluster at {address!r} ({str(error).splitlines()[0]}); start one with `ray start --head`"
            ) from error
    return ray


def _require_listener(address: str) -> None:
    """Raise OSError where nobody listens: ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "://" not in address:
        socket.create_connection((host, int(port)), timeout=10).close()
