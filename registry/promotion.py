"""From an approved candidate to what servers serve, and back.

Order: everything is checked again, the release is published and read back, then one row is appended to the ledger. That
row is the promotion; what comes after (the routes that servers read, MLflow's alias) projects it and can be repeated by
anyone at any time. A process that dies before the row changed nothing; one that dies after it leaves projections that are
behind, which `reconcile` reports and repairs.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from components.contracts.errors import DecisionRefused, RegistryUnavailable, StoreError, TamperedArtefact, VisionloopError
from components.contracts.records import Record
from components.contracts.releases import Route, Routes
from components.contracts.verdicts import Verdict, exceptable
from components.releases import ReleaseStore
from registry import approval
from registry.ledger import Entry, Principal
from registry.models import Registry, bound_in, described, release_in

FLOW = Principal(name="flows/promote", method="machine")
_ROUNDS = 5


class Difference(Record):
    """Something that does not say what the ledger says."""

    what: str
    expected: str
    found: str
    repaired: bool = False


@dataclass(frozen=True)
class CheckedVersion:
    """An approved version whose files are the approved ones."""

    version: str
    release: str
    approved: Entry


class Promotion:
    """Moves one model's champion."""

    def __init__(self, registry: Registry, releases: ReleaseStore, model: str) -> None:
        self.registry = registry
        self.ledger = registry.ledger
        self.releases = releases
        self.model = model

    def check(self, version: str) -> CheckedVersion:
        """Whether an approved version may go live now: rules, every byte, every digest. Publishes its release.

        Raises DecisionRefused, TamperedArtefact or RegistryUnavailable; nothing has moved then.
        """
        self.registry.expect_whole_ledger(self.model)
        entries = self.ledger.entries(self.model)
        state, approved = approval.promotable(entries, version, self.ledger.now())
        with self.registry.bundle(self.model, version, state.requested.body["manifest_sha256"]) as (bundle, _):
            found = bound_in(bundle)
            bound = approved.body["bound"]
            changed = sorted(name for name in {*found, *bound} if found.get(name) != bound.get(name))
            if changed:
                raise DecisionRefused(
                    f"the approval of version {version} is void: {', '.join(changed)} changed since {approved.actor.name} "
                    f"approved it. Nothing was moved; register the model anew"
                )
            verdict = Verdict.read(json.loads((bundle / "evidence" / "verdict.json").read_text()))
            if verdict.status != "pass" and not (state.undecided and exceptable(verdict) == state.undecided):
                raise DecisionRefused(
                    f"the gates did not pass version {version}, and its evidence does not say that they left just "
                    f"{', '.join(state.undecided) or 'nothing'} undecided; it cannot be promoted"
                )
            with tempfile.TemporaryDirectory(prefix="visionloop-release-") as scratch:
                digest = self.releases.publish(release_in(bundle, out=Path(scratch)))
        self.releases.verify(self.model, digest)
        return CheckedVersion(version, digest, approved)

    def move(self, checked: CheckedVersion) -> Entry:
        """Append the promotion, unless anything changed since the check. The champion has moved when this returns."""
        return self.ledger.decide(model=self.model, actor=FLOW, rule=approval.promote(checked.version, checked.release))

    def promote(self, version: str, *, say: Callable[[str], None] = lambda _: None) -> Entry:
        """Check, move, project, read back. Repeating it after any failure goes on where it stopped."""
        entry = self.current(version)
        if entry is None:
            entry = self.move(self.check(version))
        say(f"version {version} is champion of {self.model} (ledger row {entry.seq})")
        self.project()
        self.read_back()
        say("routes, MLflow's alias and the published release were read back")
        self.describe(say=say)
        return entry

    def current(self, version: str) -> Entry | None:
        """The row that promoted this version, where it is champion already: what is left to do is to project it."""
        current = approval.champion(self.ledger.entries(self.model))
        promoted = current is not None and current.kind == "promoted" and current.body["version"] == version
        return current if promoted else None

    def rollback(self, to: str | None, by: Principal, reason: str, *, say: Callable[[str], None] = lambda _: None) -> Entry:
        """Make an earlier champion the champion again; its release is verified before anything moves."""
        entries = self.ledger.entries(self.model)
        current = approval.champion(entries)
        if current is None:
            raise DecisionRefused(f"{self.model} has no champion to roll back from")
        repeated = (
            to in (None, current.body["version"])
            and current.kind == "rolled_back"
            and approval.same_person(current.actor, by)
            and current.body["reason"] == reason.strip()
        )
        if repeated:
            # The same command again, after a failure or a lost answer: it finishes what it began, and goes no further back.
            entry = current
        else:
            target = approval.rollback_target(entries, to)
            self._expect_published(target, say)
            rule = approval.rollback(target.body["version"], by, reason, leaving=current.seq)
            entry = self.ledger.decide(model=self.model, actor=by, rule=rule)
        version = entry.body["version"]
        self._route(entry)
        say(f"moved: version {version} is champion again (ledger row {entry.seq}); servers switch to it now")
        try:
            self.project()
            self.read_back()
        except VisionloopError as error:
            raise RegistryUnavailable(
                f"version {version} is champion again (ledger row {entry.seq}) and servers are told so, but MLflow does not "
                f"show it yet: {error}. Do not roll back again; run `visionloop reconcile --repair` when it is back"
            ) from error
        self.describe(say=say)
        return entry

    def project(self) -> None:
        """Write what the ledger says into the routes and MLflow's alias, until the ledger says nothing newer."""
        for _ in range(_ROUNDS):
            entry = self._champion()
            self._route(entry)
            self.registry.point_alias(self.model, entry)
            if self._champion().seq == entry.seq:
                return
        raise RegistryUnavailable(f"the champion of {self.model} keeps changing; run `visionloop reconcile --repair` later")

    def describe(self, *, say: Callable[[str], None] = lambda _: None) -> None:
        """Let MLflow say of each version how it stands. No decision depends on that: a failure is told, not raised."""
        try:
            for version, (wanted, found) in self._descriptions().items():
                if wanted != found:
                    self.registry.describe(self.model, version, wanted)
        except VisionloopError as error:
            say(f"MLflow's descriptions are behind ({error}); `visionloop reconcile --repair` writes them")

    def _descriptions(self) -> dict[str, tuple[str, str]]:
        """What MLflow should say of each version that it has, and what it says."""
        entries = self.ledger.entries(self.model)
        found = self.registry.descriptions(self.model)
        wanted = described(approval.states(entries, self.ledger.now()), entries)
        return {version: (text, found[version]) for version, text in wanted.items() if version in found}

    def read_back(self) -> None:
        """Raise unless routes, alias and release say what the ledger says."""
        differences = self.differences()
        if differences:
            listed = "; ".join(f"{d.what} is {d.found}, expected {d.expected}" for d in differences)
            raise StoreError(f"read back after the move: {listed}. Run `visionloop reconcile --repair`")

    def differences(self) -> list[Difference]:
        """Where routes, MLflow's alias or the published release do not say what the ledger says."""
        entry = approval.champion(self.ledger.entries(self.model))
        alias = self.registry.alias(self.model)
        try:
            routes: Routes | str | None = self.releases.routes(self.model)
        except (TamperedArtefact, StoreError) as error:
            routes = str(error)
        if entry is None:
            found = [Difference(what="MLflow's alias champion", expected="none", found=f"version {alias}")] if alias else []
            if routes is not None:
                found.append(Difference(what="the routes", expected="none", found=_shown(routes)))
            return found
        found = []
        wanted = _routes_of(self.model, entry)
        if routes != wanted:
            found.append(Difference(what="the routes", expected=_shown(wanted), found=_shown(routes)))
        if alias != entry.body["version"]:
            expected, actual = f"version {entry.body['version']}", f"version {alias}" if alias else "none"
            found.append(Difference(what="MLflow's alias champion", expected=expected, found=actual))
        try:
            self.releases.verify(self.model, entry.body["release"])
        except StoreError as error:
            found.append(Difference(what="the release", expected=str(entry.body["release"]), found=str(error)))
        return found

    def reconcile(self, *, repair: bool) -> list[Difference]:
        """Report what does not say what the ledger says; with `repair`, make it say so. The ledger is never changed."""
        behind = self._behind()
        found = [*self.differences(), *behind]
        if not found or not repair:
            return found
        self.describe()
        if found == behind:
            return [d.model_copy(update={"repaired": d not in self._behind()}) for d in behind]
        entry = approval.champion(self.ledger.entries(self.model))
        if entry is None:
            # Somebody pointed at a version that nobody approved: nothing may be served from that.
            return found
        if any(difference.what == "the release" for difference in found):
            with suppress(VisionloopError):  # what is left is reported
                self._publish_again(entry)
        # Whatever generation somebody wrote there: the ledger's word replaces it.
        self.releases.move(_routes_of(self.model, entry), force=True)
        self.project()
        left = {difference.what for difference in [*self.differences(), *self._behind()]}
        return [d.model_copy(update={"repaired": d.what not in left}) for d in found]

    def _behind(self) -> list[Difference]:
        return [
            Difference(what=f"MLflow's description of version {version}", expected=wanted, found=found or "none")
            for version, (wanted, found) in self._descriptions().items()
            if wanted != found
        ]

    def _expect_published(self, entry: Entry, say: Callable[[str], None]) -> None:
        """Verify the release of an earlier champion; where the store lost or changed it, publish it again from MLflow."""
        try:
            self.releases.verify(self.model, entry.body["release"])
        except StoreError as lost:
            try:
                self._publish_again(entry)
                self.releases.verify(self.model, entry.body["release"])
                say(f"{lost}; it was published again from version {entry.body['version']} in MLflow")
            except VisionloopError as error:
                raise StoreError(
                    f"{lost}. It could not be published again from version {entry.body['version']} in MLflow: {error}. "
                    f"Nothing was moved"
                ) from error

    def _publish_again(self, entry: Entry) -> None:
        version, manifest = entry.body["version"], entry.body["manifest_sha256"]
        with self.registry.bundle(self.model, version, manifest) as (bundle, _):
            with tempfile.TemporaryDirectory(prefix="visionloop-release-") as scratch:
                release = release_in(bundle, out=Path(scratch))
                if release.record.digest() == entry.body["release"]:
                    self.releases.publish(release)

    def _champion(self) -> Entry:
        entry = approval.champion(self.ledger.entries(self.model))
        if entry is None:
            raise DecisionRefused(f"{self.model} has no champion")
        return entry

    def _route(self, entry: Entry) -> None:
        # A generation is the number of a ledger row: one that the ledger has not reached was not written by it.
        self.releases.move(_routes_of(self.model, entry), newest=lambda: self.ledger.entries()[-1].seq)


def _routes_of(model: str, entry: Entry) -> Routes:
    route = Route(release=entry.body["release"], version=entry.body["version"], role="champion", weight=1.0)
    return Routes(model=model, generation=entry.seq, routes=(route,))


def _shown(routes: Routes | str | None) -> str:
    if routes is None:
        return "none"
    if isinstance(routes, str):
        return routes
    return f"generation {routes.generation}: " + ", ".join(f"{r.role} version {r.version}" for r in routes.routes)
