"""Opening a run: lock and data are checked before any stage starts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

import requests
from prefect import runtime

from components import optimisation
from components.contracts.wording import counted
from components.segments import limit
from components.training import on_this_machine
from flows import stopping
from flows.terminal import Console
from flows.training.chosen import ChosenRecipe
from flows.training.progress import reported
from flows.training.run import STAGES, Run
from flows.workspace.data import ensure
from flows.workspace.settings import Settings, read_settings


@contextmanager
def opened(recipe: ChosenRecipe, reason: str, *, requested_by: str, quiet: bool) -> Iterator[Run]:
    """A run whose data are the pinned ones and whose workspace is held."""
    workspace, config = recipe.workspace, recipe.config
    settings = read_settings(workspace.state)
    # Before data are fetched for a training that cannot be.
    on_this_machine(config.training, settings.num_threads, settings.ray_address)
    if config.optimisation.passes:
        optimisation.on_this_machine(config.training)
    with workspace.locked(f"visionloop train {recipe.name}"), Console(len(STAGES), quiet=quiet) as console:
        limit(workspace.cache, settings.cache_bytes)
        data = ensure(workspace, config.source, config.source_settings)
        run = Run(workspace, config, data, settings, console, requested_by=requested_by, reason=reason)
        run.begin(recipe.overrides)
        console.line(
            f"run {run.id}: recipe {config.name}, {counted(data.num_files, 'file')} of data version {data.dvc_hash[:12]} "
            f"({reason})"
        )
        if run.compute.told:
            console.line(f"    training on {run.compute.told}")
        for name, why in run.absent.items():
            console.line(f"    {name}: {why}")
        flow_run = runtime.flow_run.id  # of this thread alone
        told = reported(console, run.folder, model=config.model, asked_by=requested_by)
        with told, stopping.at_once(console.stopped, lambda text: _crashed(settings, flow_run, text)):
            yield run


def _crashed(settings: Settings, flow_run: str | None, text: str) -> None:
    """Tell the Prefect server of a run that is stopped, if it hears it at once; else it would look as if it still ran."""

    def authorised(request: requests.PreparedRequest) -> requests.PreparedRequest:
        if settings.prefect_authorization:
            request.headers["Authorization"] = settings.prefect_authorization
        return request

    if settings.prefect_api_url and flow_run:
        with contextlib.suppress(requests.RequestException, ValueError):
            requests.post(
                f"{settings.prefect_api_url.rstrip('/')}/flow_runs/{flow_run}/set_state",
                json={"state": {"type": "CRASHED", "message": text}, "force": True},
                auth=authorised,  # a callable, so that ~/.netrc is not read
                timeout=1.5,
                allow_redirects=False,  # the credential is for this server
            )
