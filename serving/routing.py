"""Which release answers for a model: follows the routes, and switches without losing a request.

A new release is copied, verified, loaded in a process of its own, warmed up and asked its golden vectors while the old one
answers; then one assignment makes it the one that new requests go to, and the old one finishes what it has. A release that
does not come up changes nothing. The release before stays warm for a while, so a rollback switches at once. What is
served is remembered beside the verified copies: with the store, the registry and the database all gone, a restart serves it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from components.contracts.errors import StoreError, VisionloopError
from components.contracts.releases import Routes
from components.releases import ReleaseStore
from components.store import seal, unseal, write_atomically
from serving.engines.deployment import Deployment
from serving.engines.limits import Limits, NotServing
from serving.metrics import Metrics, log

_RETRY_S = 30.0


@dataclass(frozen=True)
class Following:
    """How routes are followed."""

    refresh_s: float = 2.0
    drain_s: float = 30.0
    standby_s: float = 600.0
    """How long the release before stays loaded."""


class Routed:
    """One model: its current deployment, and the one before."""

    def __init__(
        self,
        model: str,
        *,
        store: ReleaseStore,
        state: Path,
        limits: Limits,
        following: Following,
        metrics: Metrics,
        plugins: Path | None,
        served: Callable[[], Sequence[Deployment]],
    ) -> None:
        self.model = model
        self.problem: str | None = None
        """Why the routes are not followed at the moment; None when they are."""
        self._store, self._state = store, state
        self._limits, self._following, self._metrics, self._plugins = limits, following, metrics, plugins
        self._served = served
        """What this server answers with now, of every model: a release that loads leaves the processors to it."""
        self._current: Deployment | None = None
        self._standby: Deployment | None = None
        self._standby_until = 0.0
        self._routes: Routes | None = None
        """What is followed. Routes go forward only; forged ones that were repaired may look like a step back."""
        self._refused: dict[str, float] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._lock = asyncio.Lock()
        # Present from the start: a figure that appears with its first event cannot be watched for it.
        for counter in (metrics.switches, metrics.load_failures, metrics.worker_restarts):
            counter.labels(model)

    @property
    def current(self) -> Deployment:
        """The deployment that answers; raises NotServing before the first one is ready."""
        if self._current is None:
            raise NotServing
        return self._current

    @property
    def ready(self) -> bool:
        return self._current is not None and self._current.ready

    @property
    def deployment(self) -> Deployment | None:
        return self._current

    async def follow(self) -> None:
        """Look at the routes for ever."""
        while True:
            await self.refresh()
            await asyncio.sleep(self._following.refresh_s)

    async def refresh(self, *, patient: bool = True) -> None:
        """Look at the routes now, and switch when they say so; never raises for what a store or a release does.

        A release that was refused a moment ago is tried again only when not `patient`: when a person asks.
        """
        if not patient:
            self._refused.clear()
        async with self._lock:
            try:
                await self._refresh()
            except Exception as error:
                # Whatever a store or a file does to us, the routes are looked at again, and what serves goes on.
                self._note(_told(error))

    def _note(self, problem: str | None) -> None:
        if problem is not None and problem != self.problem:
            log("routes are not followed", level=logging.WARNING, model=self.model, problem=problem)
        self.problem = problem

    async def _refresh(self) -> None:
        await self._retire_standby()
        problem = None
        try:
            routes = await asyncio.to_thread(self._store.routes, self.model)
        except VisionloopError as error:
            # Statically stable: what was served goes on, also over a restart.
            routes, problem = None, str(error)
        if routes is None and (self._current is not None or (remembered := self._remembered()) is not None):
            problem = problem or f"the store has no routes of {self.model} any more; what was served before goes on"
            routes = None if self._current is not None else remembered
        if routes is None:
            self._note(problem or f"no release of {self.model} is routed yet (visionloop promote)")
            return
        if routes == self._routes:
            self._note(problem)
            return
        route = routes.routes[0]
        if self._refused.get(route.release, 0.0) > time.monotonic():
            return
        try:
            await self._switch(routes)
            self._note(problem)
        except Exception as error:
            self._refused[route.release] = time.monotonic() + _RETRY_S
            self._metrics.load_failures.labels(self.model).inc()
            problem = f"release {route.release[:12]} (version {route.version}) was not taken: {_told(error)}"
            if self._current is None:
                self._note(problem)
                problem += await self._fall_back(route.release)
            goes_on = f"; version {self._current.version} goes on" if self._current is not None else ""
            self._note(problem + goes_on)

    async def _fall_back(self, refused: str) -> str:
        """Serve what was served before a restart, where what is routed now cannot be; returns why that did not work."""
        remembered = self._remembered()
        if remembered is None or remembered.routes[0].release == refused:
            return ""
        try:
            await self._switch(remembered)
        except Exception as error:
            return f"; nor was version {remembered.routes[0].version}, which was served before: {_told(error)}"
        return ""

    async def _switch(self, routes: Routes) -> None:
        route = routes.routes[0]
        old, standby = self._current, self._standby
        if old is not None and old.digest == route.release:
            old.version, old.generation = route.version, routes.generation
            self._metrics.generation.labels(self.model).set(routes.generation)
            self._routes = routes
            await asyncio.to_thread(self._remember, routes)
            return
        started = time.monotonic()
        if standby is not None and standby.digest == route.release and standby.ready:
            new, self._standby = standby, None
            new.version, new.generation = route.version, routes.generation
        else:
            release = await asyncio.to_thread(
                self._store.fetch, self.model, route.release, cache=self._state / "releases" / self.model
            )
            new = Deployment(
                release,
                version=route.version,
                generation=routes.generation,
                limits=self._limits,
                metrics=self._metrics,
                plugins=self._plugins,
            )
            try:
                await new.start(beside=self._served())
            except BaseException:
                await new.close()
                raise
        # Before it answers: a server that is killed as soon as it is ready has to find what it served. In a thread: what
        # syncs a disk can take as long as the disk likes, and the release before answers meanwhile.
        try:
            await asyncio.to_thread(self._remember, routes)
        except BaseException:
            await new.close()
            raise
        self._routes = routes
        if old is not None:
            new.succeed(old)
        self._current = new  # requests that come from here on are the new release's
        self._metrics.switches.labels(self.model).inc()
        self._metrics.generation.labels(self.model).set(routes.generation)
        log(
            "release serves",
            model=self.model,
            version=route.version,
            release=route.release,
            generation=routes.generation,
            seconds=round(time.monotonic() - started, 3),
        )
        if old is not None:
            displaced, self._standby = self._standby, old
            self._standby_until = time.monotonic() + self._following.standby_s
            if displaced is not None:
                self._retire(displaced)

    def _retire(self, deployment: Deployment) -> None:
        async def retire() -> None:
            if not await deployment.drain(self._following.drain_s):
                log("drain took too long", level=logging.WARNING, model=self.model, version=deployment.version)
            await deployment.close()

        task = asyncio.get_running_loop().create_task(retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _retire_standby(self) -> None:
        if self._standby is not None and time.monotonic() > self._standby_until:
            retired, self._standby = self._standby, None
            self._retire(retired)

    def _remember(self, routes: Routes) -> None:
        path = self._state / "routes" / f"{self.model}.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(path, seal(routes.to_json()))
        except OSError as error:
            # The memory of a restart, not what is served now.
            log("routes were not remembered", level=logging.WARNING, model=self.model, problem=str(error))

    def _remembered(self) -> Routes | None:
        try:
            body = unseal((self._state / "routes" / f"{self.model}.json").read_bytes())
            routes = Routes.read(body) if body is not None else None
        except (OSError, StoreError):
            return None
        return routes if routes is not None and routes.model == self.model else None

    async def close(self, *, drain_s: float) -> None:
        """Finish what was taken, then end every engine."""
        for deployment in (self._current, self._standby):
            if deployment is not None:
                await deployment.drain(drain_s)
                await deployment.close()
        for task in list(self._retiring):
            task.cancel()


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, VisionloopError) else f"{type(error).__name__}: {error}"
