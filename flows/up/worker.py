"""The worker of `visionloop up`: Prefect's process worker, whose flow runs give way as it does.

Prefect starts each flow run in a session of its own, so that cancelling one ends all that it started. Linux shares the
processors between sessions first, and a new one begins as every other's equal: what the worker gives up is not inherited.

    python -P -m flows.up.worker POOL NAME LIMIT
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import functools
import os
import sys
from typing import TYPE_CHECKING, Any

import anyio.abc
from prefect.logging.configuration import setup_logging
from prefect.settings import PREFECT_WORKER_HEARTBEAT_SECONDS
from prefect.utilities.processutils import setup_signal_handlers_worker
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker

from flows.up.processes import give_way

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun
    from prefect.workers.process import ProcessWorkerResult


said = functools.partial(print, flush=True)
"""To the log of the worker, at once."""


class _Started(anyio.abc.TaskStatus[int]):
    """Hears the pid of a flow run, the leader of its session, and passes it on."""

    def __init__(self, told: anyio.abc.TaskStatus[Any]) -> None:
        self._told = told

    def started(self, value: int | None = None) -> None:
        if value is not None and not give_way(value):
            said(f"the system does not let process {value} give way to other programs now")
        self._told.started(value)


class YieldingWorker(ProcessWorker, abc.ABC):  # an abstract one is not registered: to Prefect it is its own process worker
    """A process worker whose flow runs have a lower priority than other sessions."""

    async def run(
        self,
        flow_run: FlowRun,
        configuration: ProcessJobConfiguration,
        task_status: anyio.abc.TaskStatus[int] | None = None,
    ) -> ProcessWorkerResult:
        """Run a flow run in a process; see `ProcessWorker.run`."""
        return await super().run(flow_run, configuration, _Started(task_status or anyio.TASK_STATUS_IGNORED))


async def _work(pool: str, name: str, limit: int) -> None:
    # Prefect's server takes whole seconds, its setting any.
    heartbeat = int(PREFECT_WORKER_HEARTBEAT_SECONDS.value())
    worker = YieldingWorker(work_pool_name=pool, name=name, limit=limit, heartbeat_interval_seconds=heartbeat)
    setup_signal_handlers_worker(os.getpid(), "the worker", said)
    with contextlib.suppress(asyncio.CancelledError):  # SIGTERM
        await worker.start(printer=said)
    said(f"the worker {name} has stopped")


if __name__ == "__main__":
    setup_logging()
    asyncio.run(_work(sys.argv[1], sys.argv[2], int(sys.argv[3])))
