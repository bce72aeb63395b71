"""The OpenAPI document against the server: what one admits or refuses, the other does too."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
from served import MODEL, Server, png

SEED = 20260301


@pytest.mark.slow
def test_server_and_document_agree_whatever_is_asked(running: Server) -> None:
    """Requests made from the document, good ones and bad ones, the same every time."""
    # Imported here, because it takes seconds.
    schemathesis, engine = import_module("schemathesis"), import_module("schemathesis.engine")
    events = import_module("schemathesis.engine.events")
    document = json.loads(running.ask("GET", "/openapi.json").body)
    # Names that no document of every server can have: else each request would be one to a model that is not there.
    document["components"]["parameters"]["model"]["schema"]["enum"] = [MODEL]
    document["components"]["parameters"]["version"]["schema"]["enum"] = ["1"]
    asked, wrong = 0, set()
    config = schemathesis.Config.from_dict(
        {
            "seed": SEED,
            "base-url": f"http://127.0.0.1:{running.port}",
            "workers": 1,
            "continue-on-failure": True,
            "generation": {"max-examples": 25, "mode": "all", "deterministic": True, "database": "none", "no-shrink": True},
            "phases": {"stateful": {"enabled": False}},
            # Bytes made from a document are no pictures, so no request to predict is good.
            "checks": {"positive_data_acceptance": {"enabled": False}, "ignored_auth": {"enabled": False}},
        }
    )
    for event in engine.from_schema(schemathesis.openapi.from_dict(document, config=config)).execute():
        assert not isinstance(event, events.NonFatalError | events.FatalError), event
        if not isinstance(event, events.ScenarioFinished):
            continue
        for identifier, checks in event.recorder.checks.items():
            asked += 1
            for check in checks:
                if check.failure_info is not None:
                    case = event.recorder.cases[identifier].value
                    answer = event.recorder.interactions[identifier].response
                    body = answer.content[:200] if answer is not None else None
                    told = str(check.failure_info.failure)
                    wrong.add(
                        f"{check.name}: {case.method} {case.formatted_path} {case.query} {case.headers} {case.body!r:.300}\n  {told}\n  {body!r}"
                    )
    assert not wrong, f"{len(wrong)} of {asked}\n" + "\n".join(sorted(wrong)[:40])
    assert asked > 500
    assert running.predict(png("disc", 1)).status == 200
