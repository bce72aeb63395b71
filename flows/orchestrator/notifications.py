"""What happened in the loop, told to people and to Prefect: best effort, never needed for correctness.

The ledger and the loop's tables are what counts; a notification that is lost costs a message. Every destination gets a few
seconds, in a thread, and a failure becomes one line on the console.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal

from flows.orchestrator.events import emit
from flows.workspace.settings import Settings

Event = Literal[
    "requested",
    "undecided",
    "excepted",
    "rejected",
    "approved",
    "promoted",
    "rolled_back",
    "drift",
    "refused",
    "unwatched",
]
_TIMEOUT_S = 5.0


def notify(
    settings: Settings, event: Event, model: str, facts: Mapping[str, Any], *, say: Callable[[str], None] = lambda _: None
) -> list[str]:
    """Emit a Prefect event (where a server is configured) and send the notifications; returns what went wrong."""
    sentence = _sentence(event, model, facts)
    destinations: list[tuple[str, Callable[[], None]]] = [
        (_shown(url), functools.partial(_send, url, sentence)) for url in settings.notify
    ]
    if settings.prefect_api_url:
        payload = {key: value for key, value in facts.items() if isinstance(value, (str, int, float, bool))}
        tell = functools.partial(emit, settings, f"visionloop.model.{event}", model, payload)
        destinations.append(("the Prefect event", tell))
    problems: list[str] = []
    threads = []
    for name, action in destinations:
        outcome: list[str] = ["no answer in time"]
        thread = threading.Thread(target=_attempt, args=(action, outcome), daemon=True)
        thread.start()
        threads.append((name, thread, outcome))
    for name, thread, outcome in threads:
        thread.join(_TIMEOUT_S)
        if outcome:
            problems.append(f"{name} was not told: {outcome[0]}")
    for problem in problems:
        say(f"note: {problem}; it is on record all the same")
    return problems


def _attempt(action: Callable[[], None], outcome: list[str]) -> None:
    try:
        action()
        outcome.clear()
    except Exception as error:
        # Apprise, Prefect and their transports share no base class, and none of them may stop a promotion.
        outcome[0] = type(error).__name__ if not str(error) else str(error).splitlines()[0][:200]


def _sentence(event: Event, model: str, facts: Mapping[str, Any]) -> str:
    version, by, reason = facts.get("version", "?"), facts.get("by", "?"), facts.get("reason", "")
    if event == "refused":
        return f"{model}: a retraining was refused by the governor ({by}): {reason}"
    if event == "unwatched":
        return f"{model} is not watched: {reason}"
    if event == "rejected" and by == "the gates":
        asked = f" (asked for by {facts['requested_by']})" if facts.get("requested_by") else ""
        if facts.get("verdict") == "inconclusive":
            return f"{model}: the gates could not decide about a new model{asked}, so it is no candidate: {reason}"
        return f"{model}: a new model was rejected by the gates{asked}: {reason}"
    words = {
        "requested": "waits for approval, asked for by",
        "undecided": "is undecided and waits for an exception, asked for by",
        "excepted": "has an exception signed by",
        "rejected": "was rejected by",
        "approved": "was approved by",
        "promoted": "is champion now, promoted by",
        "rolled_back": "is champion again, rolled back by",
        "drift": "sees drift, by",
    }[event]
    return f"{model} version {version} {words} {by}" + (f": {reason}" if reason else "")


def _shown(destination: str) -> str:
    """A destination without what is secret in it."""
    return destination.split("://", 1)[0] + "://..." if "://" in destination else destination


def _send(destination: str, sentence: str) -> None:
    if "://" in destination:
        import apprise

        sender = apprise.Apprise()
        if not sender.add(destination):
            raise ValueError("Apprise does not know this kind of address")
        if not sender.notify(title="visionloop", body=sentence):
            raise ValueError("Apprise could not deliver it")
        return
    if "/" not in destination:
        raise ValueError("expected an Apprise URL, or a Prefect block as type/name")
    from prefect.blocks.core import Block

    block: Any = Block.load(destination)
    block.notify(sentence, subject="visionloop")
