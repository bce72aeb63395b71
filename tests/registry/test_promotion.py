from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
from bundles import evidence
from failpoints import Died, Failpoints
from mlflow import MlflowClient
from stores import s3_bucket

from components import releases as releases_module
from components.contracts.errors import DecisionRefused, RegistryUnavailable, StoreError, TamperedArtefact, VisionloopError
from components.contracts.verdicts import Undecided
from components.databases import now
from components.releases import ReleaseStore
from registry import approval, models, promotion
from registry.approval import person
from registry.ledger import Ledger
from registry.models import CHAMPION, Registry, bound_in
from registry.promotion import Promotion

ANN, BOB = person("ann"), person("bob")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


Desk = Callable[[str], Promotion]


@pytest.fixture
def desk(uri: str, tmp_path: Path) -> Desk:
    """A fresh Promotion each call, as a new process would have it."""

    def fresh(model: str) -> Promotion:
        registry = Registry(uri, Ledger(f"sqlite:///{tmp_path / 'ledger.db'}"), artifacts=tmp_path / "artifacts")
        return Promotion(registry, ReleaseStore(str(tmp_path / "releases")), model)

    return fresh


def excepted(desk: Promotion, version: str, *gates: str) -> None:
    rule = approval.except_gates(version, ANN, gates, "looked at by hand")
    desk.ledger.decide(model=desk.model, actor=ANN, rule=rule)


def candidate(desk: Promotion, tmp_path: Path, digest: str, *, approved: bool = True) -> str:
    """Register (and approve) a candidate that was judged against today's champion; returns its version."""
    champion = desk.ledger.champion(desk.model)
    engine = champion.body["engine"] if champion else None
    given = evidence(tmp_path, desk.model, digest=digest, champion_engine=engine)
    version: str = desk.registry.register(given).version  # type: ignore[union-attr]
    if approved:
        desk.ledger.decide(model=desk.model, actor=ANN, rule=approval.approve(version, ANN, "good figures"))
    return version


def assert_invariants(desk: Promotion) -> None:
    """champion -> gated, approved by a person, every digest verifies; one champion; the chain holds."""
    entries = desk.ledger.entries(desk.model)
    routes = desk.releases.routes(desk.model)
    champion = approval.champion(entries)
    if routes is not None:
        (route,) = routes.routes
        row = next(e for e in entries if e.seq == routes.generation)
        assert row.kind in ("promoted", "rolled_back")
        assert (row.body["release"], row.body["version"]) == (route.release, route.version)
        desk.releases.verify(desk.model, route.release)
    if champion is None:
        assert routes is None
        assert desk.registry.alias(desk.model) is None
        return
    rows = {entry.seq: entry for entry in entries}
    promoted = rows[champion.body["promoted_seq"]] if champion.kind == "rolled_back" else champion
    approved = rows[promoted.body["approved_seq"]]
    requested = rows[promoted.body["requested_seq"]]
    assert requested.kind == "requested"
    undecided_gates = requested.body.get("undecided", [])
    assert requested.body["status"] == ("inconclusive" if undecided_gates else "pass")
    assert sorted(approved.body.get("exceptions", {})) == undecided_gates
    assert approved.kind == "approved"
    assert approved.actor.method == "declared"
    assert approved.body["bound"] == requested.body["bound"]
    desk.releases.verify(desk.model, champion.body["release"])


def test_promotion_moves_ledger_routes_and_alias(desk: Desk, tmp_path: Path) -> None:
    mine = desk("moves")
    version = candidate(mine, tmp_path, "a")
    entry = mine.promote(version)
    assert mine.differences() == []
    assert mine.registry.alias("moves") == version
    routes = mine.releases.routes("moves")
    assert routes is not None
    assert (routes.generation, routes.routes[0].release) == (entry.seq, entry.body["release"])
    assert mine.promote(version) == entry
    assert_invariants(mine)
    fetched = mine.releases.fetch("moves", entry.body["release"], cache=tmp_path / "cache")
    assert (fetched.folder / "engine" / "model.bin").read_bytes() == b"engine of a"


def test_rollback_moves_everything_back(desk: Desk, tmp_path: Path) -> None:
    mine = desk("back")
    first, second = None, None
    first = mine.promote(candidate(mine, tmp_path, "a"))
    second = mine.promote(candidate(mine, tmp_path, "b"))
    lines: list[str] = []
    entry = mine.rollback(None, BOB, "complaints", say=lines.append)
    assert entry.body["version"] == first.body["version"]
    assert entry.body["previous"]["version"] == second.body["version"]
    assert mine.differences() == []
    assert "servers switch to it now" in lines[0]
    assert_invariants(mine)


@pytest.mark.parametrize("what", ["changed", "lost"])
def test_rollback_publishes_a_release_again_that_the_store_does_not_have(desk: Desk, tmp_path: Path, what: str) -> None:
    model = f"store-{what}"
    mine = desk(model)
    first = mine.promote(candidate(mine, tmp_path, "a"))
    second = mine.promote(candidate(mine, tmp_path, "b"))
    folder = tmp_path / "releases" / "releases" / model / first.body["release"]
    if what == "lost":
        shutil.rmtree(folder)
    else:
        (folder / "engine" / "model.bin").write_bytes(b"x")
    away = Promotion(Registry("http://127.0.0.1:9", mine.ledger, artifacts=None), mine.releases, model)
    with pytest.raises(StoreError, match="could not be published again from version 1 in MLflow: .*Nothing was moved"):
        away.rollback(None, BOB, "complaints")
    assert mine.ledger.champion(model) == second
    lines: list[str] = []
    assert mine.rollback(None, BOB, "complaints", say=lines.append).body["version"] == first.body["version"]
    assert "it was published again from version 1 in MLflow" in lines[0]
    assert_invariants(mine)


def test_rollback_to_a_release_whose_every_copy_was_tampered_with_moves_nothing(desk: Desk, tmp_path: Path) -> None:
    mine = desk("damaged")
    first = mine.promote(candidate(mine, tmp_path, "a"))
    second = mine.promote(candidate(mine, tmp_path, "b"))
    changed = [path for path in tmp_path.rglob("model.bin") if path.read_bytes() == b"engine of a"]
    assert len(changed) > 1
    for path in changed:
        path.write_bytes(b"x")
    with pytest.raises(
        StoreError, match=r"engine/model.bin of release .* was changed after it was published.*Nothing was moved"
    ):
        mine.rollback(None, BOB, "complaints")
    assert mine.ledger.champion("damaged") == second
    assert first.body["version"] != second.body["version"]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("engines/e/model.bin", "engine"),
        ("checkpoint/weights.safetensors", "weights"),
        ("evidence/verdict.json", "verdict"),
        ("evidence/splits.json", "split"),
        ("evidence/dataset.json", "data"),
        ("evidence/e.evaluation.json", "evidence"),
        ("release/golden.safetensors", "golden"),
        ("evidence/release.json", "release"),
    ],
)
def test_any_change_after_the_approval_voids_it(desk: Desk, tmp_path: Path, uri: str, name: str, what: str) -> None:
    """Data version, evidence, golden vectors and release, each changed in MLflow's own artefacts."""
    mine = desk(f"void-{what}")
    version = candidate(mine, tmp_path, "a")
    found = MlflowClient(uri).get_model_version(mine.model, version)
    (path,) = (tmp_path / "artifacts").rglob(f"{mine.model}/**/{name}")
    path.write_bytes(path.read_bytes().replace(b"0", b"1").replace(b"a", b"b"))
    assert found is not None
    with pytest.raises(TamperedArtefact):
        mine.promote(version)
    assert mine.ledger.champion(mine.model) is None
    assert_invariants(mine)


def undecided(desk: Promotion, tmp_path: Path) -> str:
    """Register a version that two gates did not decide on, except them and approve it."""
    outcome = desk.registry.register(evidence(tmp_path, desk.model, status="undecided", digest="a"))
    assert isinstance(outcome, Undecided)
    assert outcome.gates == ("latency", "no_regression")
    excepted(desk, outcome.version, "latency", "no_regression")
    rule = approval.approve(outcome.version, ANN, "good figures")
    desk.ledger.decide(model=desk.model, actor=ANN, rule=rule)
    return outcome.version


def test_an_undecided_version_moves_no_pointer_until_its_gates_are_excepted_and_it_is_approved(
    desk: Desk, tmp_path: Path, uri: str
) -> None:
    mine = desk("undecided")
    again = mine.registry.register(evidence(tmp_path, mine.model, status="undecided", digest="a"))
    version = again.version  # type: ignore[union-attr]
    assert mine.registry.register(evidence(tmp_path, mine.model, status="undecided", digest="a")) == again
    told = MlflowClient(uri).get_model_version(mine.model, version).description
    assert told is not None
    assert "Undecided: waits for an exception for latency, no_regression" in told
    with pytest.raises(DecisionRefused, match="--gate latency --gate no_regression"):
        mine.promote(version)
    assert_invariants(mine)
    excepted(mine, version, "latency")
    with pytest.raises(DecisionRefused, match="no_regression did not decide"):
        mine.promote(version)
    excepted(mine, version, "no_regression")
    with pytest.raises(DecisionRefused, match="waits for a person's approval"):
        mine.promote(version)
    assert mine.ledger.champion(mine.model) is None
    mine.ledger.decide(model=mine.model, actor=ANN, rule=approval.approve(version, ANN, "good figures"))
    assert mine.promote(version).body["version"] == version
    assert_invariants(mine)
    assert mine.reconcile(repair=False) == []


@pytest.mark.parametrize("name", ["evidence/verdict.json", "evidence/e.evaluation.json", "engines/e/model.bin"])
def test_evidence_that_is_edited_after_the_exception_was_signed_voids_it(desk: Desk, tmp_path: Path, name: str) -> None:
    mine = desk(f"edited-{name.replace('/', '-').replace('.', '-')}")
    version = undecided(mine, tmp_path)
    (path,) = (tmp_path / "artifacts").rglob(f"{mine.model}/**/{name}")
    path.write_bytes(path.read_bytes().replace(b"inconclusive", b"pass") + b" ")
    with pytest.raises(TamperedArtefact):
        mine.promote(version)
    assert mine.ledger.champion(mine.model) is None
    assert_invariants(mine)


def test_an_exception_lets_no_other_gate_pass(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = desk("other-gates")
    version = undecided(mine, tmp_path)
    monkeypatch.setattr(promotion, "exceptable", lambda _: ("latency", "no_regression", "accuracy"))
    with pytest.raises(DecisionRefused, match="does not say that they left just latency, no_regression undecided"):
        mine.promote(version)
    assert_invariants(mine)


def test_a_bundle_of_other_digests_than_approved_is_refused(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = desk("other")
    version = candidate(mine, tmp_path, "a")
    real = bound_in
    monkeypatch.setattr(promotion, "bound_in", lambda folder: {**real(folder), "policy": "laxer", "data": "more"})
    with pytest.raises(DecisionRefused, match="is void: data, policy changed since ann approved it"):
        mine.promote(version)
    assert_invariants(mine)


def test_two_promotions_at_once_end_with_one_champion(desk: Desk, tmp_path: Path) -> None:
    mine = desk("race")
    versions = [candidate(mine, tmp_path, digest) for digest in ("a", "b")]

    def attempt(version: str) -> str:
        try:
            desk("race").promote(version)
        except VisionloopError as error:
            return type(error).__name__
        return "done"

    with ThreadPoolExecutor(2) as pool:
        outcome = list(pool.map(attempt, versions))
    assert sorted(outcome) == ["DecisionRefused", "done"]
    assert mine.differences() == []
    assert_invariants(mine)


def test_the_alias_moved_by_hand_is_reported_and_repaired(desk: Desk, tmp_path: Path, uri: str) -> None:
    mine = desk("hand")
    version = candidate(mine, tmp_path, "a")
    other = candidate(mine, tmp_path, "b", approved=False)
    mine.describe()
    client = MlflowClient(uri)
    client.set_registered_model_alias("hand", CHAMPION, other)
    (difference,) = mine.reconcile(repair=True)
    assert (difference.expected, difference.found, difference.repaired) == ("none", f"version {other}", False)
    client.delete_registered_model_alias("hand", CHAMPION)
    mine.promote(version)
    assert mine.reconcile(repair=False) == []
    client.set_registered_model_alias("hand", CHAMPION, other)
    (difference,) = mine.reconcile(repair=False)
    assert (difference.what, difference.expected, difference.found) == (
        "MLflow's alias champion",
        f"version {version}",
        f"version {other}",
    )
    assert mine.registry.alias("hand") == other
    (difference,) = mine.reconcile(repair=True)
    assert difference.repaired
    assert mine.registry.alias("hand") == version


def test_routes_and_releases_that_were_lost_or_changed_are_repaired(desk: Desk, tmp_path: Path) -> None:
    mine = desk("lost")
    entry = mine.promote(candidate(mine, tmp_path, "a"))
    shutil.rmtree(tmp_path / "releases")
    whats = {difference.what: difference.repaired for difference in mine.reconcile(repair=True)}
    assert whats == {"the routes": True, "the release": True}
    path = tmp_path / "releases" / "routes" / "lost.json"
    path.write_text(json.dumps({"model": "lost"}))
    (difference,) = mine.reconcile(repair=True)
    assert "changed by hand" in difference.found
    assert difference.repaired
    assert mine.releases.verify("lost", entry.body["release"])
    assert mine.differences() == []


def test_mlflow_down_after_a_rollback_leaves_servers_on_the_right_release(desk: Desk, tmp_path: Path) -> None:
    mine = desk("down")
    first = mine.promote(candidate(mine, tmp_path, "a"))
    mine.promote(candidate(mine, tmp_path, "b"))
    broken = Promotion(Registry("http://127.0.0.1:9", mine.ledger, artifacts=None), mine.releases, "down")
    with pytest.raises(RegistryUnavailable, match="MLflow"):
        broken.rollback(None, BOB, "complaints")
    routes = mine.releases.routes("down")
    assert routes is not None
    assert routes.routes[0].release == first.body["release"]
    assert {d.repaired for d in mine.reconcile(repair=True)} == {True}
    assert mine.reconcile(repair=False) == []


def test_mlflow_describes_each_version_as_the_ledger_has_it(
    desk: Desk, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = desk("said")

    def said() -> list[str]:
        mine.describe()
        versions = sorted(MlflowClient(uri).search_model_versions("name='said'"), key=lambda v: int(v.version))
        return [str(version.description).removeprefix("Verdict: pass. Serving engine: e. ")[:15] for version in versions]

    first = candidate(mine, tmp_path, "a", approved=False)
    assert said() == ["Waits for appro"]
    mine.ledger.decide(model="said", actor=ANN, rule=approval.approve(first, ANN, "good figures"))
    assert said() == ["Approved by ann"]
    mine.promote(first)
    second = candidate(mine, tmp_path, "b")
    third = candidate(mine, tmp_path, "c", approved=False)
    mine.ledger.decide(model="said", actor=ANN, rule=approval.reject(third, ANN, "not now"))
    assert said() == ["Champion since ", "Approved by ann", "Rejected by ann"]

    def refused(*_: object) -> None:
        raise RegistryUnavailable("MLflow is away")

    lines: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(Registry, "describe", refused)
        mine.promote(second, say=lines.append)  # which no description stops
    assert "MLflow is away" in lines[-1]
    assert [d.what for d in mine.reconcile(repair=False)] == [
        "MLflow's description of version 1",
        "MLflow's description of version 2",
    ]
    assert {d.repaired for d in mine.reconcile(repair=True)} == {True}
    assert mine.reconcile(repair=False) == []
    assert said() == ["Former champion", "Champion since ", "Rejected by ann"]


def test_an_expired_approval_promotes_nothing(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = desk("late")
    version = candidate(mine, tmp_path, "a")
    monkeypatch.setattr("registry.ledger.now", lambda connection: now(connection) + datetime.timedelta(days=8))
    with pytest.raises(DecisionRefused, match="expired"):
        mine.promote(version)
    assert mine.releases.published("late") == []


def places() -> list[tuple[Any, str]]:
    """Where a promotion touches the world."""
    return [
        (os, "replace"),
        (os, "rename"),
        (os, "fsync"),
        (shutil, "copyfile"),
        (releases_module, "write_atomically"),
        (models, "verify_bundle"),
        (promotion, "bound_in"),
        (MlflowClient, "set_registered_model_alias"),
        (MlflowClient, "set_model_version_tag"),
        (MlflowClient, "get_model_version_by_alias"),
        (Ledger, "_append"),
        (Ledger, "decide"),
        (Ledger, "entries"),
        (ReleaseStore, "publish"),
        (ReleaseStore, "verify"),
        (ReleaseStore, "move"),
    ]


def fail_at_every_call(
    desk: Desk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    name: str,
    failing: Callable[[int], Failpoints],
    *,
    every: int = 1,
) -> list[str]:
    """Promote or roll back, failing at the first call, at `every` one after it, until all succeed; where it failed.

    After each failure what is served is approved and whole, and running again ends the same.
    """
    hits: list[str] = []
    while not hits or hits[-1]:
        mine = desk(f"{name}-{len(hits) + 1}")
        first = candidate(mine, tmp_path, "a")
        if what == "rollback":
            mine.promote(first)
            mine.promote(candidate(mine, tmp_path, "b"))

        def act(target: Promotion, version: str = first) -> Any:
            current = target.ledger.champion(target.model)
            if what == "promote":
                return target.promote(version)
            if current is not None and current.kind == "rolled_back":
                return target.reconcile(repair=True)
            return target.rollback(version, BOB, "complaints")

        points = failing(every * len(hits) + 1)
        with monkeypatch.context() as patched:
            points(patched)
            with contextlib.suppress(Died, RegistryUnavailable):
                act(mine)
        hits.append(points.hit)
        survivor = desk(mine.model)
        assert_invariants(survivor)
        act(survivor)
        assert_invariants(survivor)
        assert survivor.differences() == []
        moves = [e for e in survivor.ledger.entries(survivor.model) if e.kind in ("promoted", "rolled_back")]
        assert len(moves) == (1 if what == "promote" else 3)
        champion = survivor.ledger.champion(survivor.model)
        assert champion is not None
        assert champion.body["version"] == first
    return hits


@pytest.mark.parametrize("what", ["promote", "rollback"])
@pytest.mark.parametrize(
    ("when", "every"),
    # What is there after a call is what is there before the next one.
    [("after", 4), pytest.param("before", 1, marks=pytest.mark.slow), pytest.param("after", 1, marks=pytest.mark.slow)],
)
def test_a_death_at_any_call_leaves_a_truth_and_running_again_ends_the_same(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, when: Literal["before", "after"], every: int
) -> None:
    name = f"{what}-{when}-{every}"
    hits = fail_at_every_call(
        desk, tmp_path, monkeypatch, what, name, lambda nth: Failpoints(places(), nth=nth, when=when), every=every
    )
    assert len(hits) > 15 / every
    assert every > 1 or {"replace", "fsync", "_append", "set_registered_model_alias", "move"} <= set(hits)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["promote", "rollback"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_any_request_to_s3_that_fails_leaves_a_truth_and_running_again_ends_the_same(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, when: Literal["before", "after"]
) -> None:
    """Every request of a promotion in turn does not arrive, or arrives and its answer is lost."""
    from botocore.client import BaseClient
    from botocore.exceptions import EndpointConnectionError

    def lost(_: str) -> None:
        raise EndpointConnectionError(endpoint_url="https://s3.invalid")

    with s3_bucket("releases") as url:

        def on_s3(model: str) -> Promotion:
            registry = Registry(uri, Ledger(f"sqlite:///{tmp_path / 'ledger.db'}"), artifacts=tmp_path / "artifacts")
            return Promotion(registry, ReleaseStore(f"{url}/{what}-{when}"), model)

        hits = fail_at_every_call(
            on_s3,
            tmp_path,
            monkeypatch,
            what,
            f"s3-{what}-{when}",
            lambda nth: Failpoints([(BaseClient, "_make_api_call")], nth=nth, when=when, fail=lost),
        )
    assert len(hits) > (20 if what == "promote" else 8)


def test_the_same_rollback_again_goes_no_further_back(desk: Desk, tmp_path: Path) -> None:
    mine = desk("again")
    versions = [mine.promote(candidate(mine, tmp_path, digest)).body["version"] for digest in ("a", "b", "c")]
    broken = Promotion(Registry("http://127.0.0.1:9", mine.ledger, artifacts=None), mine.releases, "again")
    with pytest.raises(RegistryUnavailable, match=r"version 2 is champion again .* Do not roll back again; run"):
        broken.rollback(None, BOB, "complaints")
    for _ in range(2):
        assert mine.rollback(None, BOB, "complaints").body["version"] == versions[1]
    assert [e.kind for e in mine.ledger.entries("again")].count("rolled_back") == 1
    assert mine.differences() == []
    assert mine.rollback(None, BOB, "still worse").body["version"] == versions[0]


def test_routes_forged_with_a_later_generation_are_replaced(desk: Desk, tmp_path: Path) -> None:
    mine = desk("forged")
    entry = mine.promote(candidate(mine, tmp_path, "a"))
    # A row that moves nothing: the ledger is further than its champion.
    candidate(mine, tmp_path, "c", approved=False)
    routes = mine.releases.routes("forged")
    assert routes is not None
    for generation in (10**6, entry.seq + 1, entry.seq):
        other = routes.routes[0].model_copy(update={"version": "66"})
        forged = routes.model_copy(update={"generation": generation, "routes": (other,)})
        mine.releases.move(forged, force=True)
        (difference,) = mine.reconcile(repair=True)
        assert "version 66" in difference.found
        assert difference.repaired
        assert mine.releases.routes("forged") == routes
    mine.releases.move(routes.model_copy(update={"generation": 10**6}), force=True)
    later = mine.promote(candidate(mine, tmp_path, "b"))
    moved = mine.releases.routes("forged")
    assert moved is not None
    assert moved.generation == later.seq


def test_a_promotion_that_is_overtaken_does_not_write_its_routes_over_the_later_ones(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = desk("raced"), desk("raced")
    version = candidate(mine, tmp_path, "a")
    move = mine.releases.move
    seen: list[int] = []

    def overtaken(*given: Any, **options: Any) -> Any:
        if not seen:
            seen.append(other.promote(candidate(other, tmp_path, "b")).seq)
        moved = move(*given, **options)
        seen.append(moved.generation)
        return moved

    monkeypatch.setattr(mine.releases, "move", overtaken)
    mine.promote(version)
    assert seen == [seen[0]] * len(seen)
    assert mine.differences() == []


def test_a_ledger_that_was_cut_promotes_nothing(desk: Desk, tmp_path: Path) -> None:
    mine = desk("cut")
    mine.promote(candidate(mine, tmp_path, "a"))
    version = candidate(mine, tmp_path, "b")
    rows = mine.ledger.entries()
    shorter = Ledger(f"sqlite:///{tmp_path / 'shorter.db'}")
    for row in rows[:1]:
        shorter.append(row.kind, model=row.model, subject=row.subject, actor=row.actor, body=row.body, key=row.key)
    cut = Promotion(Registry(mine.registry.tracking_uri, shorter, artifacts=None), mine.releases, "cut")
    with pytest.raises(RegistryUnavailable, match="the ledger ends at row 1, but MLflow knows of row"):
        cut.check(version)
