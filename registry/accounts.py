"""Who may sign in at the console: users with roles, their sessions and tokens, and a record of who came and did what.

The tables lie beside the ledger, in its database, whose clock decides what has ended. Of a password argon2's hash is kept;
of a session's cookie and of a token the sha256, which is enough for 256 random bits. The record is only appended to.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import threading
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import sqlalchemy as sa
from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from components.contracts.errors import ConfigError, SignInRefused, TooManyTries, UnknownName
from components.contracts.records import Record
from components.contracts.wording import is_text, shown_utc
from components.databases import Database, now
from registry.account_tables import (
    AUDIT,
    IMMUTABLE,
    LOCK,
    METADATA,
    SESSIONS,
    TOKENS,
    USERS,
    first_of,
    iso,
    moment_of,
    printable,
    rows_of,
    sha256_of,
    time_of,
)
from registry.approval import checked_name, person, plain_name
from registry.ledger import Principal

Role = Literal["viewer", "trainer", "approver", "admin"]
"""Each may do what the ones before it may: look; start trainings; decide on versions; change users."""
ROLES: tuple[Role, ...] = get_args(Role)
Method = Literal["password", "oidc", "token"]

IDLE = datetime.timedelta(hours=8)
"""A session that nobody uses for so long has ended: a working day, so that nobody signs in twice a day."""
LIFETIME = datetime.timedelta(days=7)
"""A session ends after so long however much it is used: a cookie that was copied is of no use for ever."""
_SIGHTING = datetime.timedelta(minutes=5)
"""A session's last use is written down once in so long: a page that writes has to wait for the ledger's writers."""
TOKEN_DAYS = 90.0
WINDOW = datetime.timedelta(minutes=15)
"""Sign-ins that were refused count for so long."""
TRIES_OF_LOGIN = 5
"""Refusals of one login from one address before more are not looked at: a person's typing errors. They are counted together,
or anybody could keep a person out by trying that login from elsewhere."""
TRIES_OF_ADDRESS = 50
"""Refusals from one address whatever the login: an office makes fewer, and a million passwords take months."""
MIN_PASSWORD, MAX_PASSWORD = 12, 1024
"""Characters: what NIST SP 800-63B asks for and more; and what costs argon2 nothing to speak of."""
_WAIT_S = 10.0
_REFUSED, _SIGNED_IN = "sign-in refused", "signed in"
_SUBJECT = re.compile(r"https?://\S{1,255} [\x21-\x7e]{1,255}")


class User(Record):
    """A person who may sign in."""

    login: str
    name: str
    """As the ledger and others read it."""
    role: Role
    also: tuple[str, ...] = ()
    """Other names and logins of the same person: who asked for a training under one of them cannot approve it."""
    subject: str = ""
    """`ISSUER SUBJECT`, who they are for an OpenID Connect provider; empty without one."""
    enabled: bool = True
    has_password: bool
    made_at: str
    """UTC, ISO 8601."""

    @property
    def known_as(self) -> tuple[str, ...]:
        """All their names beside the one that decisions are recorded under."""
        return (self.login, *self.also)


@dataclass(frozen=True)
class SignedIn:
    """A user who proved to be one, and by what."""

    user: User
    """With the role that holds here: a token's may be lower than its user's."""
    token: str = field(repr=False)
    """What proves it again: a session's cookie, or the token itself."""
    csrf: str = field(repr=False)
    """What a form of this session carries; empty of a token, which no browser sends by itself."""
    expires_at: datetime.datetime
    method: Method

    @property
    def principal(self) -> Principal:
        """Who acts, for the ledger."""
        return person(self.user.name, self.method)

    def may(self, role: Role) -> bool:
        """Whether this user may do what needs a role."""
        return ROLES.index(self.user.role) >= ROLES.index(role)


class Token(Record):
    """A token for programs, without what would be let in with it."""

    login: str
    name: str
    role: Role
    """What may be done with it: never more than its user may now."""
    made_at: str
    made_by: str
    expires_at: str
    state: Literal["valid", "expired", "revoked"]


class AuditRow(Record):
    """Something that somebody did, or was refused."""

    seq: int
    at: str
    """UTC, ISO 8601."""
    what: str
    who: str
    address: str
    """Where from; empty of the command line."""
    detail: str


class Accounts:
    """The users behind one database URL. Tables are made on first use; threads may share it.

    `by` is who changes something, as it is recorded.
    """

    def __init__(self, url: str) -> None:
        self._database = Database(url, METADATA, name="the table of users", lock=LOCK, once=IMMUTABLE)
        self._hasher = PasswordHasher()
        self._dummy = ""
        # One password at a time: each takes 64 MB, and tries that come at once are counted one by one.
        self._looking = threading.Lock()

    def any_users(self) -> bool:
        """Whether anybody was ever added and not removed; without users, nobody has to sign in."""
        with self._database.reading() as connection:
            return connection.execute(sa.select(USERS.c.key).limit(1)).first() is not None

    def users(self) -> list[User]:
        """All of them, by login."""
        with self._database.reading() as connection:
            return [_user(row) for row in rows_of(connection, sa.select(USERS).order_by(USERS.c.key))]

    def find(self, login: str) -> User:
        """One of them; raises UnknownName."""
        with self._database.reading() as connection:
            return _user(_find(rows_of(connection, sa.select(USERS)), login))

    def expect_free(self, login: str, *, role: str, name: str = "", also: Sequence[str] = (), subject: str = "") -> None:
        """Raise what `add` would, before anybody is asked for a password."""
        values = _new(login, role=role, name=name, also=also, subject=subject)
        with self._database.reading() as connection:
            _expect_new(values, rows_of(connection, sa.select(USERS)))

    def add(
        self,
        login: str,
        *,
        role: str,
        by: str,
        name: str = "",
        also: Sequence[str] = (),
        subject: str = "",
        password: str | None = None,
        address: str = "",
    ) -> User:
        """Add a user, whose name is the login where none is given.

        Raises ConfigError for a login, a name or a subject that somebody has, and for what is none.
        """
        values = _new(login, role=role, name=name, also=also, subject=subject)
        values["password"] = self._hash(password, [login, name]) if password is not None else ""
        with self._database.transaction() as connection:
            _expect_new(values, rows_of(connection, sa.select(USERS)))
            values["made_at"] = time_of(connection)
            connection.execute(USERS.insert().values(values))
            self._append(connection, "user added", by, address, _told(values))
        return _user(values)

    def change(
        self,
        login: str,
        *,
        by: str,
        name: str | None = None,
        role: str | None = None,
        also: Sequence[str] | None = None,
        subject: str | None = None,
        enabled: bool | None = None,
        password: str | None = None,
        address: str = "",
    ) -> User:
        """Change what is given of a user; a name that is given up stays among their others.

        A new password, or being disabled, ends their sessions. Raises UnknownName or ConfigError, the latter also where no
        enabled admin would be left.
        """
        hashed = self._hash(password, [login]) if password is not None else None
        with self._database.transaction() as connection:
            others = rows_of(connection, sa.select(USERS))
            was = _find(others, login)
            others.remove(was)
            values = dict(was)
            if name is not None:
                values["name"] = checked_name(name, "name")
            if role is not None:
                values["role"] = _checked_role(role)
            if subject is not None:
                values["subject"] = _checked_subject(subject)
            if enabled is not None:
                values["enabled"] = enabled
            if hashed is not None:
                values["password"] = hashed
            values["also"] = _also([*(json.loads(was["also"]) if also is None else also), was["name"]], values)
            _expect_apart(values, others)
            _expect_admin([was, *others], [values, *others])
            connection.execute(USERS.update().where(USERS.c.key == was["key"]).values(values))
            if hashed is not None or not values["enabled"]:
                connection.execute(SESSIONS.delete().where(SESSIONS.c.user == was["key"]))
            changed = ", ".join(sorted(key for key in values if values[key] != was[key])) or "nothing"
            self._append(connection, "user changed", by, address, f"{_told(values)}; changed: {changed}")
        return _user(values)

    def remove(self, login: str, *, by: str, address: str = "") -> None:
        """Remove a user with their sessions and tokens; others may have their names then, which `enabled=False` prevents.

        Raises UnknownName, or ConfigError where no enabled admin would be left.
        """
        with self._database.transaction() as connection:
            others = rows_of(connection, sa.select(USERS))
            was = _find(others, login)
            others.remove(was)
            _expect_admin([was, *others], others)
            for table, column in ((USERS, USERS.c.key), (SESSIONS, SESSIONS.c.user), (TOKENS, TOKENS.c.user)):
                connection.execute(table.delete().where(column == was["key"]))
            self._append(connection, "user removed", by, address, _told(was))

    def sign_in(self, login: str, password: str, *, address: str) -> SignedIn:
        """A new session for who knows the password.

        Raises SignInRefused, which neither tells nor shows by its time whether there is such a user; TooManyTries, without a
        look at the password.
        """
        key = plain_name(login[: 4 * MAX_PASSWORD])
        with self._one_at_a_time():
            with self._database.reading() as connection:
                row = first_of(connection, sa.select(USERS).where(USERS.c.key == key)) if is_text(key) else None
                # Who typed a password in place of the login would find it in the record.
                who = row["login"] if row is not None else f"unknown {sha256_of(key)[:8]}"
                again_at = _again_at(connection, who, _network(address))
            if again_at is not None:
                raise TooManyTries(
                    f"too many sign-ins were refused from here; wait until {shown_utc(again_at.isoformat())}", again_at
                )
            hashed = row["password"] if row is not None else ""
            right = self._matches(hashed, password)
            with self._database.transaction() as connection:
                # What was true when the password was looked at may not be so any more.
                row = first_of(connection, sa.select(USERS).where(USERS.c.key == key)) if row is not None else None
                why = _refusal(row, hashed, right)
                if row is not None and not why:
                    if self._hasher.check_needs_rehash(hashed):
                        anew = {"password": self._hasher.hash(_spelled(password))}
                        connection.execute(USERS.update().where(USERS.c.key == key).values(anew))
                    return self._start(connection, row, "password", address)
                self._append(connection, _REFUSED, who, address, why)
        raise SignInRefused(_NOT_IN)

    def sign_in_subject(self, issuer: str, subject: str, *, login_hint: str = "", address: str) -> SignedIn:
        """A new session for whom an OpenID Connect provider vouches for; `login_hint` is what it calls them, for the record.

        Raises SignInRefused for one who was not added with this subject.
        """
        known = f"{issuer} {subject}"
        with self._database.transaction() as connection:
            found = rows_of(connection, sa.select(USERS).where(USERS.c.subject == known)) if is_text(known) else []
            if found and found[0]["enabled"]:
                return self._start(connection, found[0], "oidc", address)
            why = "is disabled" if found else f"no user has the subject {known}"
            who = found[0]["login"] if found else login_hint or "unknown"
            self._append(connection, _REFUSED, who, address, why)
        if found:
            raise SignInRefused(_NOT_IN)
        raise SignInRefused(
            f"nobody was added here with the subject {known!r}; an admin can do that: "
            f'visionloop user change LOGIN --oidc "{known}"'
        )

    def _start(self, connection: sa.Connection, row: Mapping[str, Any], method: Method, address: str) -> SignedIn:
        moment = now(connection)
        gone = sa.or_(SESSIONS.c.made_at <= iso(moment - LIFETIME), SESSIONS.c.seen_at <= iso(moment - IDLE))
        connection.execute(SESSIONS.delete().where(gone))
        token, at = secrets.token_urlsafe(32), iso(moment)
        values = {"sha256": sha256_of(token), "user": row["key"], "method": method, "made_at": at, "seen_at": at}
        connection.execute(SESSIONS.insert().values(values))
        self._append(connection, _SIGNED_IN, row["login"], address, f"by {method}")
        return SignedIn(_user(row), token, _csrf(token), moment + LIFETIME, method)

    def session(self, token: str) -> SignedIn | None:
        """Whose session a cookie is of; None of one that was forged, has ended, or whose user may not sign in any more."""
        query = sa.select(USERS, SESSIONS.c.method, SESSIONS.c.made_at.label("since"), SESSIONS.c.seen_at)
        query = query.join(USERS, USERS.c.key == SESSIONS.c.user).where(SESSIONS.c.sha256 == sha256_of(token))
        with self._database.reading() as connection:
            row, moment = first_of(connection, query), now(connection)
        if row is None or not row["enabled"]:
            return None
        ends, seen = moment_of(row["since"]) + LIFETIME, moment_of(row["seen_at"])
        # One that was made in the future, before a clock was set right, would go on for long.
        if not ends - LIFETIME - _SIGHTING <= moment < min(ends, seen + IDLE):
            return None
        if moment - seen > _SIGHTING:
            with self._database.transaction() as connection:
                seen_now = {"seen_at": time_of(connection)}
                connection.execute(SESSIONS.update().where(SESSIONS.c.sha256 == sha256_of(token)).values(seen_now))
        return SignedIn(_user(row), token, _csrf(token), ends, row["method"])

    def sign_out(self, token: str, *, address: str = "") -> None:
        """End a session; of one that has ended already, nothing is said."""
        with self._database.transaction() as connection:
            query = sa.select(USERS.c.login).join(SESSIONS, USERS.c.key == SESSIONS.c.user)
            row = first_of(connection, query.where(SESSIONS.c.sha256 == sha256_of(token)))
            connection.execute(SESSIONS.delete().where(SESSIONS.c.sha256 == sha256_of(token)))
            if row is not None:
                self._append(connection, "signed out", row["login"], address, "")

    def make_token(
        self,
        login: str,
        *,
        name: str,
        by: str,
        days: float = TOKEN_DAYS,
        role: str | None = None,
        address: str = "",
    ) -> str:
        """A token for a program of a user's, which is told once; with a `role`, no more than that may be done with it.

        Raises UnknownName or ConfigError.
        """
        name, most = checked_name(name, "name of a token"), _checked_role(role) if role is not None else ROLES[-1]
        if not 0 < days <= 365:
            raise ConfigError(f"a token is valid for more than 0 and at most 365 days, not {days:g}")
        token = f"vlc_{secrets.token_urlsafe(32)}"
        with self._database.transaction() as connection:
            user, moment = _find(rows_of(connection, sa.select(USERS)), login), now(connection)
            if any(_valid(row, moment) for row in self._tokens_of(connection, user["key"], name)):
                raise ConfigError(
                    f"{user['login']} has a token {name!r} already; revoke that, or give this one another name"
                )
            ends = iso(moment + datetime.timedelta(days=days))
            values = {
                "sha256": sha256_of(token),
                "user": user["key"],
                "name": name,
                "role": most,
                "made_by": printable(by, 256),
            }
            connection.execute(TOKENS.insert().values(values | {"made_at": iso(moment), "expires_at": ends}))
            self._append(connection, "token made", by, address, f"{name} of {user['login']}, until {ends}")
        return token

    def of_token(self, token: str) -> SignedIn | None:
        """Whose token it is; None of one that was forged, revoked or has expired, or whose user may not sign in any more."""
        query = sa.select(USERS, TOKENS.c.role.label("most"), TOKENS.c.expires_at, TOKENS.c.revoked_at)
        query = query.join(USERS, USERS.c.key == TOKENS.c.user).where(TOKENS.c.sha256 == sha256_of(token))
        with self._database.reading() as connection:
            row, moment = first_of(connection, query), now(connection)
        if row is None or not row["enabled"] or not _valid(row, moment):
            return None
        user = _user(row)
        user = user.model_copy(update={"role": _lower(user.role, row["most"])})
        return SignedIn(user, token, "", moment_of(row["expires_at"]), "token")

    def revoke_token(self, login: str, name: str, *, by: str, address: str = "") -> None:
        """Make a token useless at once; raises UnknownName, also for one that is of no use any more."""
        with self._database.transaction() as connection:
            user, moment = _find(rows_of(connection, sa.select(USERS)), login), now(connection)
            valid = [row for row in self._tokens_of(connection, user["key"]) if _valid(row, moment)]
            found = [row for row in valid if plain_name(row["name"]) == plain_name(name)]
            if not found:
                raise UnknownName(f"valid token of {user['login']}", name, [row["name"] for row in valid])
            ended = TOKENS.update().where(TOKENS.c.sha256.in_([row["sha256"] for row in found]))
            connection.execute(ended.values({"revoked_at": iso(moment)}))
            self._append(connection, "token revoked", by, address, f"{found[0]['name']} of {user['login']}")

    def tokens(self) -> list[Token]:
        """All that were made for users who are still there, the newest first."""
        query = sa.select(TOKENS, USERS.c.login, USERS.c.role.label("may")).join(USERS, USERS.c.key == TOKENS.c.user)
        with self._database.reading() as connection:
            rows, moment = rows_of(connection, query.order_by(TOKENS.c.made_at.desc())), now(connection)
        names = ("login", "name", "made_at", "made_by", "expires_at")
        return [
            Token(role=_lower(row["role"], row["may"]), state=_state(row, moment), **{name: row[name] for name in names})
            for row in rows
        ]

    def audit(self, what: str, *, who: str, address: str, detail: str = "") -> None:
        """Record something; what is too long is cut, what cannot be printed is spelled out."""
        with self._database.transaction() as connection:
            self._append(connection, what, who, address, detail)

    def audit_rows(self, limit: int = 100) -> list[AuditRow]:
        """The newest rows, the newest first."""
        query = sa.select(AUDIT).order_by(AUDIT.c.seq.desc()).limit(limit)
        with self._database.reading() as connection:
            rows = rows_of(connection, query)
        return [AuditRow(**{name: value for name, value in row.items() if name != "network"}) for row in rows]

    def close(self) -> None:
        self._database.close()

    def _append(self, connection: sa.Connection, what: str, who: str, address: str, detail: str) -> None:
        last = connection.execute(sa.select(sa.func.max(AUDIT.c.seq))).scalar_one() or 0
        values = {
            "seq": last + 1,
            "at": time_of(connection),
            "what": printable(what, 64),
            "who": printable(who, 256),
            "detail": printable(detail, 2000),
        }
        values |= {"address": printable(address, 64), "network": _network(address)}
        connection.execute(AUDIT.insert().values(values))

    @staticmethod
    def _tokens_of(connection: sa.Connection, user: str, name: str | None = None) -> list[dict[str, Any]]:
        rows = rows_of(connection, sa.select(TOKENS).where(TOKENS.c.user == user))
        return [row for row in rows if name is None or plain_name(row["name"]) == plain_name(name)]

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        if not self._looking.acquire(timeout=_WAIT_S):
            with self._database.reading() as connection:
                again_at = now(connection) + datetime.timedelta(seconds=_WAIT_S)
            raise TooManyTries("too many people sign in at this moment; try again in a few seconds", again_at)
        try:
            yield
        finally:
            self._looking.release()

    def _hash(self, password: str, names: Sequence[str]) -> str:
        """What is kept of a password; raises ConfigError for one that is too easy, without quoting it."""
        if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
            raise ConfigError(f"a password has {MIN_PASSWORD} to {MAX_PASSWORD} characters, not {len(password)}")
        if not is_text(password):
            raise ConfigError("a password is one line of text, without control characters")
        if plain_name(password) in {plain_name(name) for name in names}:
            raise ConfigError("a password is not the login or the name; others know these")
        return self._hasher.hash(_spelled(password))

    def _matches(self, hashed: str, password: str) -> bool:
        """Whether a password is the one; takes as long where there is none to compare with."""
        if not self._dummy:
            self._dummy = self._hasher.hash(secrets.token_bytes(32))
        try:
            self._hasher.verify(hashed or self._dummy, _spelled(password[: MAX_PASSWORD + 1]))
        except (VerificationError, InvalidHashError):
            return False
        return True


_NOT_IN = "login or password is wrong, or this user may not sign in"


def _refusal(row: Mapping[str, Any] | None, hashed: str, right: bool) -> str:
    """Why somebody may not sign in, for the record alone; empty when they may."""
    if row is None:
        return "no such user"
    if not row["enabled"]:
        return "is disabled"
    if not row["password"]:
        return "has no password"
    return "" if right and row["password"] == hashed else "wrong password"


def _again_at(connection: sa.Connection, who: str, network: str) -> datetime.datetime | None:
    """From when on another try is looked at; None when it is now."""
    moment = now(connection)
    query = sa.select(AUDIT.c.at, AUDIT.c.what, AUDIT.c.who).where(
        AUDIT.c.network == network,
        AUDIT.c.at.between(iso(moment - WINDOW), iso(moment)),
        AUDIT.c.what.in_([_REFUSED, _SIGNED_IN]),
    )
    rows = rows_of(connection, query.order_by(AUDIT.c.seq))
    own: list[str] = []
    for row in rows:
        if row["who"] == who:
            # Who came in knows the password: the errors before that were typing errors.
            own = [*own, row["at"]] if row["what"] == _REFUSED else []
    every = [row["at"] for row in rows if row["what"] == _REFUSED]
    ends = [
        moment_of(at[-most]) + WINDOW for at, most in ((own, TRIES_OF_LOGIN), (every, TRIES_OF_ADDRESS)) if len(at) >= most
    ]
    return max(ends, default=None)


def _network(address: str) -> str:
    """Whom an address belongs to: one of IPv6 stands for the 2^64 that come with it."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return printable(address, 64)
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    return str(ip.ipv4_mapped or f"{ipaddress.IPv6Address(int(ip) >> 64 << 64)}/64")


def _find(rows: Sequence[dict[str, Any]], login: str) -> dict[str, Any]:
    for row in rows:
        if row["key"] == plain_name(login):
            return row
    raise UnknownName("user", login, [row["login"] for row in rows])


def _user(row: Mapping[str, Any]) -> User:
    return User(
        login=row["login"],
        name=row["name"],
        role=row["role"],
        also=tuple(json.loads(row["also"])),
        subject=row["subject"],
        enabled=bool(row["enabled"]),
        has_password=bool(row["password"]),
        made_at=row["made_at"],
    )


def _told(row: Mapping[str, Any]) -> str:
    """A user in one line, without the password."""
    also = json.loads(row["also"])
    facts = [f"{row['login']} ({row['name']})", row["role"], "enabled" if row["enabled"] else "disabled"]
    facts += [f"also {', '.join(also)}"] if also else []
    facts += [f"subject {row['subject']}"] if row["subject"] else []
    return ", ".join(facts)


def _new(login: str, *, role: str, name: str, also: Sequence[str], subject: str) -> dict[str, Any]:
    """A user's row, but for the password and when it was made; raises ConfigError for what is none."""
    login = checked_name(login, "login")
    values = {
        "key": plain_name(login),
        "login": login,
        "name": checked_name(name or login, "name"),
        "role": _checked_role(role),
        "subject": _checked_subject(subject),
        "enabled": True,
    }
    return values | {"also": _also(also, values)}


def _expect_new(row: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> None:
    if any(other["key"] == row["key"] for other in others):
        raise ConfigError(f"there is a user {row['login']} already; `visionloop user change {row['login']}` changes them")
    _expect_apart(row, others)


def _also(given: Sequence[str], row: Mapping[str, Any]) -> str:
    """The other names of a user as they are kept, each once."""
    names = {plain_name(name): checked_name(name, "also") for name in given}
    own = {plain_name(row["login"]), plain_name(row["name"])}
    return json.dumps(sorted(name for plain, name in names.items() if plain not in own), ensure_ascii=False)


def _names(row: Mapping[str, Any]) -> dict[str, str]:
    return {plain_name(name): name for name in (row["login"], row["name"], *json.loads(row["also"]))}


def _expect_apart(row: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError when a user would have a name or a subject of another one: no person has two accounts."""
    for other in others:
        theirs = _names(other)
        for plain, name in _names(row).items():
            if plain in theirs:
                raise ConfigError(
                    f"the user {other['login']} is known as {theirs[plain]} already; {name} is somebody else's name"
                )
        if row["subject"] and row["subject"] == other["subject"]:
            raise ConfigError(f"the user {other['login']} has the subject {row['subject']} already")


def _expect_admin(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError when a change takes away the last admin who may sign in."""

    def admins(rows: Sequence[Mapping[str, Any]]) -> list[str]:
        return [row["login"] for row in rows if row["role"] == "admin" and row["enabled"]]

    if admins(before) and not admins(after):
        raise ConfigError(f"{admins(before)[0]} is the last enabled admin; make somebody else one first")


def _checked_role(role: str) -> Role:
    for each in ROLES:
        if each == role:
            return each
    raise UnknownName("role", role, ROLES)


def _lower(one: Role, other: Role) -> Role:
    return min(one, other, key=ROLES.index)


def _checked_subject(subject: str) -> str:
    if subject and not _SUBJECT.fullmatch(subject):
        raise ConfigError(
            f"{subject[:300]!r} is no subject of OpenID Connect; expected the issuer's address, a space, and the subject, "
            f'such as "https://login.example.org 248289761001"'
        )
    return subject


def _valid(row: Mapping[str, Any], moment: datetime.datetime) -> bool:
    return _state(row, moment) == "valid"


def _state(row: Mapping[str, Any], moment: datetime.datetime) -> Literal["valid", "expired", "revoked"]:
    if row["revoked_at"] is not None:
        return "revoked"
    return "valid" if moment < moment_of(row["expires_at"]) else "expired"


def _spelled(password: str) -> bytes:
    """The bytes of a password, the same whichever way a keyboard composes its letters."""
    return unicodedata.normalize("NFC", password).encode("utf-8", "surrogatepass")


def _csrf(token: str) -> str:
    """Nobody who reads the one of a page can find the cookie from it, and no other session has the same."""
    key = token.encode("utf-8", "surrogatepass")
    return hmac.new(key, b"visionloop: a form of this session", hashlib.sha256).hexdigest()
