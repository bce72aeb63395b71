"""What the console works with: a workspace, its ledger followed row by row, people, comments, promotions on their way."""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from flows.console.config import ConsoleConfig
from flows.console.promoting import Promotions
from flows.loop.loop import Loop
from flows.loop.predictions import erased_images
from flows.workspace.desk import Desk, desk, followed_ledger, whole_ledger
from flows.workspace.people import accounts, comments
from flows.workspace.settings import Settings
from flows.workspace.workspace import Workspace

if TYPE_CHECKING:
    from registry.accounts import Accounts
    from registry.comments import Comments
    from registry.ledger import FollowedLedger, Ledger


@dataclass(frozen=True)
class Application:
    """Made once per process."""

    workspace: Workspace
    settings: Settings
    config: ConsoleConfig
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    """Of this process: what forms of people who did not sign in are told from forged ones by."""
    drawing: threading.Lock = field(default_factory=threading.Lock)
    """Matplotlib draws one figure at a time."""

    @cached_property
    def ledger(self) -> FollowedLedger:
        return followed_ledger(self.settings)

    @cached_property
    def verified_ledger(self) -> Ledger:
        """For decisions, which look at every row."""
        return whole_ledger(self.settings)

    @cached_property
    def accounts(self) -> Accounts:
        return accounts(self.workspace)

    @cached_property
    def comments(self) -> Comments:
        return comments(self.workspace)

    @cached_property
    def promotions(self) -> Promotions:
        return Promotions(self.workspace)

    def prepare(self) -> None:
        """Make what requests share, before they come in threads."""
        _ = self.ledger, self.verified_ledger, self.accounts, self.comments, self.promotions

    def models(self) -> list[str]:
        """Those that the ledger knows."""
        return sorted({entry.model for entry in self.ledger.entries()})

    def desk(self, model: str) -> Desk:
        """For looking: pages read the followed ledger. Raises UnknownName."""
        return desk(self.workspace.root, model, ledger=self.ledger)

    def deciding_desk(self, model: str) -> Desk:
        """For deciding: the whole chain is verified. Raises UnknownName."""
        return desk(self.workspace.root, model, ledger=self.verified_ledger)

    def erased(self) -> frozenset[str]:
        """Digests of the pictures that were erased; no page shows them."""
        return erased_images(self.workspace)

    def loop(self, model: str) -> Loop:
        """What is known of the model in production. Raises UnknownName."""
        return Loop(self.workspace, self.settings, self.desk(model).model, ledger=self.ledger)
