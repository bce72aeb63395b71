"""What `visionloop up` sets up on its server, and what `visionloop status` tells about it."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from components.contracts.errors import ConfigError, VisionloopError
from components.contracts.wording import counted
from flows.loop.alarms import pending, sweep
from flows.loop.loop import Loop, configured
from flows.orchestrator.events import expect_server
from flows.terminal import Say
from flows.up.processes import Standing, Up, healthy
from flows.workspace.settings import read_settings
from flows.workspace.workspace import Workspace
from monitoring.verdicts import DriftVerdict

if TYPE_CHECKING:
    from registry.ledger import Entry


def models_of(up: Up, named: Sequence[str]) -> list[str]:
    """The models to loop: those named, else the ledger's and those with a loop file."""
    from registry.ledger import Ledger

    if named:
        return list(dict.fromkeys(named))
    settings = read_settings(up.workspace.state)
    known = {entry.model for entry in Ledger(settings.ledger_url).entries()}
    return sorted(known | set(configured(up.workspace)))


def bring_up(
    workspace: Workspace, named: Sequence[str], *, port: int | None, console: bool, pages: bool, say: Say
) -> dict[str, Any]:
    """Start what the loop of these models needs, of all by default, the console, and `pages` that are there only to look at.

    Returns what runs and where its pages are. Raises ConfigError before anything is started.
    """
    up = Up(workspace, read_settings(workspace.state))
    with up.locked():
        answer = keep_up(up, named, port=port, say=say)
        if console:
            answer["pages"] = {"Console": up.start_console(say=say)} | answer["pages"]
        if pages:
            answer["pages"] |= up.start_pages(say=say)
    return answer


def deploy_models(workspace: Workspace, named: Sequence[str], *, say: Say) -> dict[str, Any]:
    """Deploy these models, or all, on the Prefect server that is known here; what each has there, by model."""
    settings = read_settings(workspace.state)
    expect_server(settings)
    return deploy_all(Up(workspace, settings), named, say=say)


def deploy_all(up: Up, named: Sequence[str], *, say: Say) -> dict[str, Any]:
    """Pool, deployments and automations on the Prefect server that is known here; what is there is brought up to date."""
    settings = read_settings(up.workspace.state)
    if not settings.prefect_api_url:
        raise ConfigError("no Prefect server is known here: set PREFECT_API_URL, or start one with `visionloop up`")
    return _deployed(_loops(up, models_of(up, named)), say)


def _loops(up: Up, models: Sequence[str]) -> list[Loop]:
    settings = read_settings(up.workspace.state)
    return [Loop(up.workspace, settings, model) for model in models]


def _deployed(loops: Sequence[Loop], say: Say) -> dict[str, Any]:
    from flows.up.deployments import automate, deploy, make_pool

    make_pool()
    found: dict[str, Any] = {}
    for loop in loops:
        deployments, automations = deploy(loop), automate(loop)
        found[loop.model] = {"deployments": deployments, "automations": automations, "recipe": loop.recipe}
        say(f"{loop.model}: deployments {', '.join(deployments)} and {counted(len(automations), 'automation')}")
    return found


def keep_up(up: Up, named: Sequence[str], *, port: int | None, say: Say) -> dict[str, Any]:
    """Server, pool, deployments, automations, worker; a training that was stopped is taken up again."""
    models = models_of(up, named)
    for loop in _loops(up, models):
        _ = loop.recipe  # one that is not valid should be said before anything is started
    server = up.start(port=port, say=say)
    from flows.up.deployments import POOL

    loops = _loops(up, models)  # which know the server now
    found = _deployed(loops, say)
    if forgotten := _forget_runs_elsewhere(up):
        say(f"removed {counted(forgotten, 'scheduled run')} of the place that this workspace was copied or moved from")
    worker = up.start_worker(server, POOL, say=say)
    for loop in loops:
        for started in sweep(loop, say=say):
            say(f"{loop.model}: the training of {started.key} is taken up again (flow run {started.flow_run_id})")
    return {
        "server": _process(server),
        "worker": _process(worker),
        "pages": up.addresses(),
        "credential_file": str(up.folder / "auth"),
        "models": found,
    }


def _forget_runs_elsewhere(up: Up) -> int:
    """Remove what waits on our own server for another folder: a copied database holds its original's runs."""
    if read_settings(up.workspace.state).prefect_database_url:
        return 0  # others may share it
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType

    waiting = FlowRunFilterStateType(any_=[StateType.SCHEDULED, StateType.PENDING])
    removed = 0
    with get_client(sync_client=True) as client:
        while found := [
            run
            for run in client.read_flow_runs(
                flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=waiting)), limit=200
            )
            if run.parameters.get("workspace") not in (None, str(up.workspace.root))
        ]:
            for run in found:
                client.delete_flow_run(run.id)
            removed += len(found)
    return removed


def _process(standing: Standing | None) -> dict[str, Any] | None:
    return {"pid": standing.pid, "api": standing.api} if standing is not None else None


def state_of(up: Up) -> dict[str, Any]:
    """Everything a person wants to know at one look."""
    server, worker = up.process("server"), up.process("worker")
    team = read_settings(up.workspace.state).prefect_api_url
    if team and (server is None or team != server.api):
        answers, problems = _of_a_team(team)
    else:
        team = ""
        answers, problems = server is not None and healthy(server.api, up.credential), []
        if server is None:
            problems.append("the Prefect server does not run: visionloop up")
        elif not answers:
            problems.append(f"the Prefect server does not answer; its log is {up.folder / 'server.log'}")
        if worker is None:
            problems.append("no worker runs here, so nothing that is scheduled happens: visionloop up")
    models: dict[str, Any] = {}
    for model in models_of(up, []):
        try:
            models[model] = _model(up, model, answers=answers)
            problems += [f"{model}: {models[model][kind]}" for kind in ("unwatched", "unable") if models[model][kind]]
        except VisionloopError as error:
            problems.append(f"{model}: {error}")
    return {"server": _process(server), "worker": _process(worker), "team": team, "models": models, "problems": problems}


def _of_a_team(api: str) -> tuple[bool, list[str]]:
    """Whether a server that others keep answers, and what is missing there."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    from flows.up.deployments import POOL

    try:
        with get_client(sync_client=True) as client:
            client.read_work_pool(POOL)
            workers = client.read_workers_for_work_pool(POOL)
    except ObjectNotFound:
        return True, [f"the Prefect server {api} has no work pool {POOL!r}: visionloop deploy"]
    except Exception as error:
        # httpx and Prefect raise many things for a server that is away, or wants another credential.
        why = str(error).splitlines()[0][:160] if str(error) else ""
        named = f"the Prefect server {api}, which PREFECT_API_URL names"
        return False, [f"{named}, does not answer ({type(error).__name__}: {why})"]
    if not any(getattr(worker.status, "value", worker.status) == "ONLINE" for worker in workers):
        nobody = f"no worker of the pool {POOL!r} is online on {api}, so nothing that is scheduled happens"
        return True, [f"{nobody}: prefect worker start --pool {POOL}"]
    return True, []


def _model(up: Up, model: str, *, answers: bool) -> dict[str, Any]:
    from flows.loop.windows import windows
    from registry import approval
    from registry.ledger import Ledger

    settings = read_settings(up.workspace.state)
    loop = Loop(up.workspace, settings, model)
    ledger = Ledger(settings.ledger_url)
    entries = ledger.entries(model)
    champion = approval.champion(entries)
    judged = windows(loop, 1)
    last = judged[-1] if judged else None
    unable, unwatched, waiting = "", "", []
    try:
        unwatched, waiting = _unwatched(loop, champion, last[1] if last else None), pending(loop)
        _ = loop.recipe
    except ConfigError as error:
        unable = str(error)
    return {
        "champion": champion.body["version"] if champion else None,
        "waiting_versions": [s.version for s in approval.states(entries, ledger.now()) if s.status == "waiting"],
        "last_window": {
            "window": last[0],
            "status": last[1].status,
            "diagnosis": last[1].diagnosis,
            "rows": last[1].window.rows,
            "until": last[1].window.until,
        }
        if last
        else None,
        "unwatched": unwatched,
        "unable": unable,
        "pending": waiting,
        "running": [run.key for run in loop.governor.runs(model) if run.state == "running"],
        "stopped": loop.governor.stopped(model),
        "scheduled": _scheduled(model) if answers else {},
    }


def _unwatched(loop: Loop, champion: Entry | None, last: DriftVerdict | None) -> str:
    """Why nobody can say that the champion's traffic is looked at; empty when it is."""
    if champion is None:
        return ""
    patience = datetime.timedelta(minutes=3 * loop.config.every_minutes)
    since = datetime.datetime.fromisoformat(last.window.until if last is not None else champion.at)
    since = max(since, datetime.datetime.fromisoformat(champion.at))
    if datetime.datetime.now(datetime.UTC) - since < patience:
        return ""
    return (
        f"no window was judged since {since:%Y-%m-%d %H:%M} UTC, one is due every "
        f"{counted(loop.config.every_minutes, 'minute')}; look at the runs of watch/{loop.model}, or run `visionloop watch`"
    )


def _scheduled(model: str) -> dict[str, str]:
    """The next scheduled run of each deployment, from Prefect's own records."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterId,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import StateType
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.exceptions import ObjectNotFound

    found: dict[str, str] = {}
    scheduled = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])))
    with get_client(sync_client=True) as client:
        for name in ("train", "watch"):
            try:
                deployment = client.read_deployment_by_name(f"{name}/{model}")
            except ObjectNotFound:
                continue
            runs = client.read_flow_runs(
                flow_run_filter=scheduled,
                deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id])),
                sort=FlowRunSort.EXPECTED_START_TIME_ASC,
                limit=1,
            )
            if runs and runs[0].expected_start_time is not None:
                moment: datetime.datetime = runs[0].expected_start_time
                found[name] = moment.astimezone(datetime.UTC).isoformat()
    return found
