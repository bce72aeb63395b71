"""Which faults Prefect tries again."""

from __future__ import annotations

from typing import Any

from prefect.cache_policies import NO_CACHE

from components.contracts.errors import RegistryUnavailable


def _transient(_task: Any, _run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), RegistryUnavailable)


REGISTRY_POLICY: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "retries": 2,
    "retry_delay_seconds": [1, 3],
    "retry_condition_fn": _transient,
}
"""Of every task that talks to MLflow or the ledger, in this flow and in the others."""
