"""What libraries report and say aloud is switched off. Nothing else is imported here: it comes before everything."""

from __future__ import annotations

import os

_QUIET = {
    # Nothing reports to its maker. OpenVINO and NNCF know no variable: components/__init__.py keeps their reporter out.
    "DO_NOT_TRACK": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "EVIDENTLY_DISABLE_TELEMETRY": "1",
    "ITERATIVE_DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GX_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Registered artefacts hold no pickle, and a foreign one must not be opened by accident.
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    # GNU OpenMP's threads spin at barriers; beside a server and a database on few cores that costs up to 6x.
    "OMP_WAIT_POLICY": "PASSIVE",
    # A tracking server that is down should be reported in seconds, not after minutes of back-off.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # Our own console shows the progress; Prefect's log lines go to its server.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_SERVER_LEVEL": "CRITICAL",
    "PREFECT_CLI_PROMPT": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "GIT_PYTHON_REFRESH": "quiet",
}


def quieten() -> None:
    """Switch off what libraries report, and what they say aloud; what a person has set stays, an empty value is none.

    Libraries read it when they are imported, and processes that are started inherit it: flows/__init__.py calls this first.
    """
    for name, value in _QUIET.items():
        if not os.environ.get(name):
            os.environ[name] = value
