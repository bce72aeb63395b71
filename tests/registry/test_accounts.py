from __future__ import annotations

import datetime
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from argon2 import PasswordHasher
from argon2.profiles import RFC_9106_LOW_MEMORY

from components import databases
from components.contracts.errors import ConfigError, SignInRefused, TooManyTries, UnknownName, VisionloopError
from registry import accounts as module
from registry.account_tables import USERS, end_sessions
from registry.accounts import Accounts, SignedIn

HOUR, DAY, MINUTE = (datetime.timedelta(**{unit: 1}) for unit in ("hours", "days", "minutes"))
PASSWORD = "correct horse battery"
HERE, THERE = "192.0.2.1", "198.51.100.7"


@pytest.fixture
def url(fresh: Callable[..., str]) -> str:
    return fresh(*(f"visionloop_{name}" for name in ("users", "sessions", "tokens", "audit")))


def cheap(url: str) -> Accounts:
    """Accounts whose passwords cost nothing to check."""
    found = Accounts(url)
    found._hasher = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    return found


@pytest.fixture
def accounts(url: str) -> Accounts:
    return cheap(url)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[datetime.timedelta], None]:
    """Moves the database's clock on by so much from now."""

    def move(by: datetime.timedelta) -> None:
        for name in ("registry.accounts.now", "registry.account_tables.now"):
            monkeypatch.setattr(name, lambda connection: databases.now(connection) + by)

    return move


def add(accounts: Accounts, login: str, role: str = "viewer", **options: Any) -> None:
    accounts.add(login, role=role, by="root", **{"password": PASSWORD, **options})


def sign_in(accounts: Accounts, login: str = "ann", password: str = PASSWORD, address: str = HERE) -> SignedIn:
    return accounts.sign_in(login, password, address=address)


def outcome(action: Callable[[], Any]) -> str:
    try:
        action()
    except VisionloopError as error:
        return type(error).__name__
    return "done"


def told(accounts: Accounts) -> list[tuple[str, str, str]]:
    return [(row.what, row.who, row.detail) for row in accounts.audit_rows()]


def test_a_user_signs_in_and_out_and_no_secret_is_kept(accounts: Accounts, url: str) -> None:
    assert not accounts.any_users()
    made = accounts.add("ann", name="Ann Lee", role="approver", also=["annie", "ANN"], password=PASSWORD, by="root")
    assert accounts.any_users()
    assert accounts.users() == [made]
    assert (made.known_as, made.has_password, made.enabled) == (("ann", "annie"), True, True)
    one, two = sign_in(accounts, " ANN "), sign_in(accounts)
    found = Accounts(url).session(one.token)
    assert found is not None
    assert (found.user, found.csrf, found.method, found.expires_at) == (made, one.csrf, "password", one.expires_at)
    assert (found.principal.name, found.principal.method) == ("Ann Lee", "password")
    assert [found.may(role) for role in module.ROLES] == [True, True, True, False]
    assert len({one.token, two.token, one.csrf, two.csrf}) == 4
    assert one.token not in repr(one)
    token = accounts.make_token("ann", name="ci", by="root")
    with sa.create_engine(url).connect() as connection:
        tables = [
            connection.execute(sa.text(f"SELECT * FROM visionloop_{t}")).all()
            for t in ("users", "sessions", "tokens", "audit")
        ]
    for secret in (PASSWORD, one.token, one.csrf, two.token, token):
        assert secret not in str(tables)
    accounts.sign_out(one.token)
    accounts.sign_out("another")
    assert accounts.session(one.token) is None
    assert accounts.session(two.token) is not None
    assert [(what, who) for what, who, _ in reversed(told(accounts))] == [
        ("user added", "root"),
        *[("signed in", "ann")] * 2,
        ("token made", "root"),
        ("signed out", "ann"),
    ]


def test_a_refused_sign_in_tells_nothing_and_costs_the_same(accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    for login in ("ann", "gone"):
        add(accounts, login)
    add(accounts, "bob", password=None)
    accounts.change("gone", enabled=False, by="root")
    verified: list[str] = []

    def verify(self: PasswordHasher, hashed: str, password: bytes) -> bool:
        verified.append(hashed.rpartition("$")[0].rpartition("$")[0])
        return bool(original(self, hashed, password))

    original = PasswordHasher.verify
    monkeypatch.setattr(PasswordHasher, "verify", verify)
    tries = [
        ("ann", "wrong " + PASSWORD, "ann", "wrong password"),
        ("ann", "x" * 2000, "ann", "wrong password"),
        ("gone", PASSWORD, "gone", "is disabled"),
        ("bob", "", "bob", "has no password"),
        ("bob", PASSWORD, "bob", "has no password"),
        ("my secret pass phrase", PASSWORD, "unknown ", "no such user"),
        ("ann\x00", "\ud800", "unknown ", "no such user"),
    ]
    messages = set()
    for login, password, _, _ in tries:
        with pytest.raises(SignInRefused) as caught:
            sign_in(accounts, login, password)
        messages.add(str(caught.value))
    assert messages == {"login or password is wrong, or this user may not sign in"}
    assert len(verified) == len(tries)
    assert len(set(verified)) == 1  # by the same parameters
    rows = told(accounts)[: len(tries)][::-1]
    for (_, _, who, why), (what, by, detail) in zip(tries, rows, strict=True):
        assert (what, by.startswith(who), detail) == ("sign-in refused", True, why)
    assert "secret" not in str(rows)


def test_who_tries_too_often_waits_and_locks_nobody_else_out(
    accounts: Accounts, later: Callable[[datetime.timedelta], None]
) -> None:
    add(accounts, "ann")
    first = datetime.datetime.now(datetime.UTC)
    for login in ("ann", "nobody"):
        for _ in range(module.TRIES_OF_LOGIN):
            with pytest.raises(SignInRefused):
                sign_in(accounts, login, "guess")
        with pytest.raises(TooManyTries, match="wait until 20.* UTC") as caught:
            sign_in(accounts, login)
        assert abs(caught.value.again_at - first - module.WINDOW) < MINUTE
    # What was not looked at does not count, and another address is another person.
    assert sign_in(accounts, address=THERE).user.login == "ann"
    later(module.WINDOW + MINUTE)
    for _ in range(2):  # who comes in has mistyped, and begins anew
        for _ in range(module.TRIES_OF_LOGIN - 1):
            with pytest.raises(SignInRefused):
                sign_in(accounts, "ann", "mistyped")
        sign_in(accounts)


@pytest.mark.parametrize("addresses", [[HERE], ["2001:db8::1", "2001:db8::ffff:2"], [HERE, f"::ffff:{HERE}"]])
def test_an_address_has_a_bound_of_its_own(accounts: Accounts, addresses: list[str]) -> None:
    add(accounts, "ann")
    for number in range(module.TRIES_OF_ADDRESS):
        with pytest.raises(SignInRefused):
            sign_in(accounts, f"login {number}", "guess", addresses[number % len(addresses)])
    assert outcome(lambda: sign_in(accounts, address=addresses[0])) == "TooManyTries"
    assert outcome(lambda: sign_in(accounts, address="2001:db8:0:1::1")) == "done"


def test_tries_that_come_at_once_are_counted_one_by_one(accounts: Accounts) -> None:
    add(accounts, "ann")
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda _: outcome(lambda: sign_in(accounts, "ann", "guess")), range(24)))
    assert sorted(found) == ["SignInRefused"] * module.TRIES_OF_LOGIN + ["TooManyTries"] * (24 - module.TRIES_OF_LOGIN)


def test_a_session_ends_when_it_is_not_used_and_after_a_week(
    accounts: Accounts, later: Callable[[datetime.timedelta], None]
) -> None:
    add(accounts, "ann")
    unused, used = sign_in(accounts), sign_in(accounts)
    for hours in (7, 14):
        later(hours * HOUR)
        assert accounts.session(used.token) is not None
    assert accounts.session(unused.token) is None
    for hours in range(21, 7 * 24, 7):
        later(hours * HOUR)
        assert accounts.session(used.token) is not None
    later(7 * DAY + MINUTE)
    assert accounts.session(used.token) is None
    ahead = sign_in(accounts)
    later(-DAY)
    assert accounts.session(ahead.token) is None
    for forged in ("", "x" * 43, used.token[:-1], used.token + " ", "\ud800\x00", "1" * 100_000):
        assert accounts.session(forged) is None


def test_what_ends_a_users_sessions_and_tokens(accounts: Accounts, url: str) -> None:
    add(accounts, "root", "admin")
    add(accounts, "ann", "approver")

    def opened() -> tuple[str, str]:
        return sign_in(accounts).token, accounts.make_token("ann", name=f"t{len(accounts.tokens())}", by="root")

    session, token = opened()
    accounts.change("ann", role="trainer", by="root")
    for found in (accounts.session(session), accounts.of_token(token)):
        assert found is not None
        assert found.may("trainer")
        assert not found.may("approver")
    accounts.change("ann", password="another password", by="root")
    assert accounts.session(session) is None
    assert outcome(lambda: sign_in(accounts)) == "SignInRefused"
    accounts.change("ann", password=PASSWORD, by="root")
    session, token = opened()
    accounts.change("ann", enabled=False, by="root")
    assert (accounts.session(session), accounts.of_token(token)) == (None, None)
    accounts.change("ann", enabled=True, by="root")
    assert accounts.session(session) is None
    session, token = opened()
    with sa.create_engine(url).begin() as connection:  # as somebody does who has no command at hand
        connection.execute(sa.update(USERS).values(enabled=False).where(USERS.c.login == "ann"))
    assert (accounts.session(session), accounts.of_token(token)) == (None, None)
    accounts.remove("ann", by="root")
    add(accounts, "ann", "admin")
    assert (accounts.session(session), accounts.of_token(token), accounts.tokens()) == (None, None, [])


def test_no_session_is_made_for_what_was_changed_while_the_password_was_looked_at(
    accounts: Accounts, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(accounts, "root", "admin")
    original = PasswordHasher.verify
    for change in ({"enabled": False}, {"password": "another password"}, {}):
        add(accounts, "ann")

        def verify(*arguments: Any, change: dict[str, Any] = change) -> bool:
            other = cheap(url)
            if change:
                other.change("ann", by="root", **change)
            else:
                other.remove("ann", by="root")
            return bool(original(*arguments))

        with monkeypatch.context() as patched:
            patched.setattr(PasswordHasher, "verify", verify)
            assert outcome(lambda: sign_in(accounts)) == "SignInRefused"
        if change:
            accounts.remove("ann", by="root")


@pytest.mark.parametrize(
    ("login", "options"),
    [
        ("BOB", {}),
        ("Robert  Müller", {}),
        ("x", {"name": "ROBERT MU\u0308LLER"}),
        ("rob", {}),
        ("x", {"also": ["Rob"]}),
        ("x", {"also": ["bob"]}),
        ("x", {"subject": "https://id.example.org 7"}),
        ("x", {"subject": "https://id.example.org"}),
        ("x", {"subject": "id.example.org 8"}),
        ("flows/train", {}),
        ("x", {"name": "a\nb"}),
        ("x", {"also": ["a/b"]}),
        ("x" * 129, {}),
        ("", {}),
        ("x", {"role": "root"}),
        ("x", {"password": "x" * 11}),
        ("x", {"password": "x" * 1025}),
        ("x", {"password": PASSWORD + "\n"}),
        ("a long login", {"password": "A long login"}),
    ],
)
def test_nobody_is_added_under_a_name_of_another_or_with_what_is_none(
    accounts: Accounts, login: str, options: dict[str, Any]
) -> None:
    add(accounts, "bob", name="Robert Müller", also=["rob"], subject="https://id.example.org 7")
    add(accounts, "ann")
    before = accounts.users()
    with pytest.raises(ConfigError) as caught:
        add(accounts, login, **options)
    if "password" in options:
        assert options["password"] not in str(caught.value)
    elif login != "" and "role" not in options:
        with pytest.raises(ConfigError):
            accounts.change("ann", by="root", **(options or {"name": login}))
    assert accounts.users() == before


def test_a_name_that_is_given_up_stays_the_same_person(accounts: Accounts) -> None:
    add(accounts, "bob", name="Robert")
    changed = accounts.change("Bob", name="Robert Müller", also=["rob"], by="root")
    assert changed.known_as == ("bob", "Robert", "rob")
    assert accounts.users() == [changed]
    with pytest.raises(ConfigError, match="the user bob is known as Robert already"):
        add(accounts, "x", name="robert")
    assert accounts.change("bob", also=["bobby"], by="root").also == ("bobby",)
    with pytest.raises(UnknownName, match="unknown user 'x'; valid: bob"):
        accounts.change("x", role="admin", by="root")
    assert "changed: also" in told(accounts)[0][2]


def test_the_last_admin_stays(accounts: Accounts, url: str) -> None:
    add(accounts, "ann", "admin")
    add(accounts, "bob", "admin")
    accounts.change("bob", enabled=False, by="root")
    for attempt in (
        lambda: accounts.remove("ann", by="root"),
        lambda: accounts.change("ann", enabled=False, by="root"),
        lambda: accounts.change("ann", role="approver", by="root"),
    ):
        with pytest.raises(ConfigError, match="ann is the last enabled admin"):
            attempt()
    accounts.change("bob", enabled=True, by="root")
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda login: outcome(lambda: cheap(url).change(login, role="viewer", by="root")), ("ann", "bob"))
    assert sorted(found) == ["ConfigError", "done"]


def test_a_token_may_no_more_than_its_user_and_ends(accounts: Accounts, later: Callable[[datetime.timedelta], None]) -> None:
    add(accounts, "ann", "approver")
    whole = accounts.make_token("ann", name="ci", by="root")
    less = accounts.make_token("ann", name="look", role="viewer", days=1, by="root")
    more = accounts.make_token("ann", name="more", role="admin", by="root")
    found = {name: accounts.of_token(token) for name, token in {"ci": whole, "look": less, "more": more}.items()}
    assert {name: each.user.role for name, each in found.items() if each} == {
        "ci": "approver",
        "look": "viewer",
        "more": "approver",
    }
    assert found["ci"] is not None
    assert (found["ci"].method, found["ci"].principal.method, found["ci"].csrf) == ("token", "token", "")
    assert {token.name: token.role for token in accounts.tokens()} == {
        "ci": "approver",
        "look": "viewer",
        "more": "approver",
    }
    # A cookie is no token, and a token no cookie.
    assert accounts.session(whole) is None
    assert accounts.of_token(sign_in(accounts).token) is None
    assert accounts.of_token("vlc_" + "x" * 43) is None
    with pytest.raises(ConfigError, match="has a token 'CI' already"):
        accounts.make_token("ann", name="CI", by="root")
    for days in (0, 366, float("nan")):
        with pytest.raises(ConfigError, match="365 days"):
            accounts.make_token("ann", name="x", days=days, by="root")
    accounts.revoke_token("ANN", "More", by="root")
    assert accounts.of_token(more) is None
    with pytest.raises(UnknownName, match="valid token of ann 'more'; valid: ci, look"):
        accounts.revoke_token("ann", "more", by="root")
    later(DAY)
    assert accounts.of_token(less) is None
    assert {token.name: token.state for token in accounts.tokens()} == {"ci": "valid", "look": "expired", "more": "revoked"}
    accounts.make_token("ann", name="look", by="root")
    later(90 * DAY)
    assert accounts.of_token(whole) is None


def test_a_provider_signs_in_whom_an_admin_has_named(accounts: Accounts) -> None:
    issuer = "https://id.example.org"
    add(accounts, "ann", password=None, subject=f"{issuer} 7")
    found = accounts.sign_in_subject(issuer, "7", address=HERE)
    assert (found.user.login, found.method, found.principal.method) == ("ann", "oidc", "oidc")
    assert accounts.session(found.token) == found
    for other, subject in (
        (issuer, "8"),
        ("https://evil.example.org", "7"),
        (f"{issuer} 7", ""),
        (issuer, "7\x00"),
        (issuer, ""),
    ):
        with pytest.raises(SignInRefused, match="visionloop user change LOGIN --oidc"):
            accounts.sign_in_subject(other, subject, login_hint="ann", address=HERE)
    add(accounts, "bob")  # without a subject nobody is let in by an empty one
    accounts.change("ann", enabled=False, by="root")
    assert accounts.session(found.token) is None
    with pytest.raises(SignInRefused, match="^login or password is wrong"):
        accounts.sign_in_subject(issuer, "7", address=HERE)


def test_the_record_is_only_appended_to(accounts: Accounts, url: str) -> None:
    add(accounts, "ann")
    accounts.audit("decision refused", who="ann", address=HERE, detail="version 3\n\x00\u202e" + "x" * 5000)
    newest = accounts.audit_rows(1)
    assert [(row.seq, row.what, row.address) for row in newest] == [(2, "decision refused", HERE)]
    assert newest[0].detail.startswith("version 3\\u000a\\u0000\\u202exxx")
    assert len(newest[0].detail) == 2000
    statements = ["UPDATE visionloop_audit SET who = 'x'", "DELETE FROM visionloop_audit"]
    replacing = "INSERT OR REPLACE INTO visionloop_audit SELECT 1, '', '', '', '', '', ''"
    statements += [replacing] if url.startswith("sqlite") else ["TRUNCATE visionloop_audit"]
    for statement in statements:
        with (
            pytest.raises(sa.exc.DBAPIError, match="the audit table is append-only"),
            sa.create_engine(url).begin() as connection,
        ):
            connection.execute(sa.text(statement))
    assert len(accounts.audit_rows()) == 2


def test_passwords_are_kept_by_argon2id_and_anew_when_its_parameters_change(accounts: Accounts, url: str) -> None:
    def kept() -> str:
        with sa.create_engine(url).connect() as connection:
            return str(connection.execute(sa.text("SELECT password FROM visionloop_users")).scalar_one())

    add(accounts, "ann", password="Mu\u0308ller's pass word")
    assert kept().startswith("$argon2id$v=19$m=8,t=1,p=1$")
    of_today = Accounts(url)
    for _ in range(2):
        sign_in(of_today, password="Müller's pass word")  # whichever way a keyboard composes it
        p = RFC_9106_LOW_MEMORY
        assert kept().startswith(f"$argon2id$v=19$m={p.memory_cost},t={p.time_cost},p={p.parallelism}$")
    once = kept()
    sign_in(of_today, password="Müller's pass word")
    assert kept() == once


def test_a_copy_that_is_brought_back_has_no_sessions(accounts: Accounts, url: str) -> None:
    end_sessions(url)  # of a database without such tables nothing is made
    assert "visionloop_sessions" not in sa.inspect(sa.create_engine(url)).get_table_names()
    add(accounts, "ann")
    session, token = sign_in(accounts).token, accounts.make_token("ann", name="ci", by="root")
    end_sessions(url)
    assert accounts.session(session) is None
    assert accounts.of_token(token) is not None
