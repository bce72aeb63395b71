"""People on the command line: who may sign in at the console, what they may do there, and what they did."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.contracts.errors import ConfigError
from components.contracts.wording import shown_utc
from flows.cli.answers import HERE, AsJson, Commands, InWorkspace, finish
from flows.terminal import to_stderr

if TYPE_CHECKING:
    from registry.accounts import Accounts, User

user_app = Commands(
    help="Who may sign in at the console, and what they may do there. "
    "(What asks a serving server for predictions has a token of its own: visionloop token.)"
)

Login = Annotated[str, typer.Argument(help="What they sign in with.")]
Name = Annotated[str | None, typer.Option(help="Their name, as the ledger and others read it.")]
Role = Annotated[
    str | None, typer.Option(help="viewer looks, trainer starts trainings, approver decides, admin changes users.")
]
Also = Annotated[
    list[str] | None,
    typer.Option(help="Another name or login of theirs; what was asked for under it they cannot approve. May be repeated."),
]
Oidc = Annotated[
    str | None,
    typer.Option(metavar="'ISSUER SUBJECT'", help="Who they are for an OpenID Connect provider; '' for nobody."),
]
FromStdin = Annotated[bool, typer.Option("--password-stdin", help="Read the password from standard input, its first line.")]
ActingAs = Annotated[str | None, typer.Option("--as", help="Who does this, for the record; your login name by default.")]
OfToken = Annotated[str, typer.Option("--name", help="What the token is for.")]


def _accounts(workspace: Path) -> Accounts:
    from flows.workspace.people import accounts
    from flows.workspace.workspace import Workspace

    return accounts(Workspace.find(workspace))


def _acting(name: str | None) -> str:
    from flows.workspace.people import acting

    return acting(name)


@user_app.command("add")
def user_add(
    login: Login,
    role: Annotated[
        str, typer.Option(help="viewer looks, trainer starts trainings, approver decides, admin changes users.")
    ],
    name: Annotated[str, typer.Option(help="Their name, as the ledger and others read it; the login by default.")] = "",
    also: Also = None,
    oidc: Oidc = None,
    password_stdin: FromStdin = False,
    as_: ActingAs = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Let somebody sign in at the console. The password is asked for, or comes from standard input; --oidc needs none.

    As soon as there is one user, everybody has to sign in.
    """
    by, users = _acting(as_), _accounts(workspace)
    first = not users.any_users()
    users.expect_free(login, role=role, name=name, also=also or (), subject=oidc or "")
    password = _password(login, stdin=password_stdin, needed=not oidc)
    made = users.add(login, role=role, name=name, also=also or (), subject=oidc or "", password=password, by=by)
    if first:
        to_stderr("From now on everybody has to sign in at the console.")
    finish(made.to_json(), json_, lambda: _line(made))


@user_app.command("list")
def user_list(workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """Logins, names, roles, and how they sign in."""
    found = _accounts(workspace).users()
    finish(
        {"users": [user.to_json() for user in found]},
        json_,
        lambda: "\n".join(_line(user) for user in found) or "No users yet: on this machine alone, nobody has to sign in.",
    )


@user_app.command("change")
def user_change(
    login: Login,
    role: Role = None,
    name: Name = None,
    also: Also = None,
    not_also: Annotated[list[str] | None, typer.Option(help="A name that is not theirs after all. May be repeated.")] = None,
    oidc: Oidc = None,
    enable: Annotated[bool | None, typer.Option("--enable/--disable", help="Whether they may sign in.")] = None,
    password: Annotated[bool, typer.Option("--password", help="Ask for a new password.")] = False,
    password_stdin: FromStdin = False,
    as_: ActingAs = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Change a user. A new password ends their sessions, --disable their tokens' use too; a former name stays theirs."""
    from flows.workspace.people import also as others

    by, users = _acting(as_), _accounts(workspace)
    was = users.find(login)
    if not any((role, name, also, not_also, oidc is not None, enable is not None, password, password_stdin)):
        raise ConfigError(f"nothing to change of {login} was named; give --role, --name, --password or another option")
    asked = password or password_stdin
    changed = users.change(
        login,
        role=role,
        name=name,
        also=others(was, add=also or (), drop=not_also or ()) if also or not_also else None,
        subject=oidc,
        enabled=enable,
        password=_password(login, stdin=password_stdin, needed=True) if asked else None,
        by=by,
    )
    finish(changed.to_json(), json_, lambda: _line(changed))


@user_app.command("remove")
def user_remove(login: Login, as_: ActingAs = None, workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """Remove a user with their tokens. `change --disable` is the better one: their names then stay theirs."""
    _accounts(workspace).remove(login, by=_acting(as_))
    finish({"removed": login}, json_, lambda: f"{login} may not sign in any more.")


@user_app.command("token")
def user_token(
    login: Login,
    name: OfToken,
    days: Annotated[float, typer.Option(help="For how many days it is valid.")] = 90.0,
    role: Annotated[str | None, typer.Option(help="The most that may be done with it; by default its user's.")] = None,
    as_: ActingAs = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Make a token with which a program acts for a user at the console. It is shown once; only its sha256 is kept."""
    from flows.workspace.people import token_of

    users = _accounts(workspace)
    token = users.make_token(login, name=name, days=days, role=role, by=_acting(as_))
    made = token_of(users, login, name)
    to_stderr(f"{made.name} of {made.login}, as {made.role}, until {shown_utc(made.expires_at)}:")
    finish(made.to_json() | {"token": token}, json_, lambda: token)


@user_app.command("tokens")
def user_tokens(workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """The tokens of all users: what for, until when, and whether they are valid."""
    found = _accounts(workspace).tokens()
    finish(
        {"tokens": [token.to_json() for token in found]},
        json_,
        lambda: (
            "\n".join(
                f"{t.login:20} {t.name:20} {t.role:9} {t.state:8} until {shown_utc(t.expires_at)}, made by {t.made_by}"
                for t in found
            )
            or "No tokens yet."
        ),
    )


@user_app.command("revoke")
def user_revoke(
    login: Login, name: OfToken, as_: ActingAs = None, workspace: InWorkspace = HERE, json_: AsJson = False
) -> None:
    """Make a token useless, at once."""
    _accounts(workspace).revoke_token(login, name, by=_acting(as_))
    finish({"login": login, "revoked": name}, json_, lambda: f"The token {name} of {login} works no more.")


@user_app.command("audit")
def user_audit(
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many, the newest.")] = 50,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Who signed in or was refused, and what was changed of users and tokens; the newest last."""
    rows = _accounts(workspace).audit_rows(limit)[::-1]
    finish(
        {"rows": [row.to_json() for row in rows]},
        json_,
        lambda: (
            "\n".join(
                f"{shown_utc(row.at)}  {row.what:16} {row.who}"
                + (f" from {row.address}" if row.address else "")
                + (f": {row.detail}" if row.detail else "")
                for row in rows
            )
            or "Nothing yet."
        ),
    )


def _line(user: User) -> str:
    ways = [way for way, has in (("password", user.has_password), (f"OpenID Connect ({user.subject})", user.subject)) if has]
    also = f"  also {', '.join(user.also)}" if user.also else ""
    enabled = "" if user.enabled else "  disabled"
    return f"{user.login:20} {user.name:24} {user.role:9} {' and '.join(ways) or 'cannot sign in'}{also}{enabled}"


def _password(login: str, *, stdin: bool, needed: bool) -> str | None:
    """A password from standard input or, twice, from whoever sits at the terminal; it is never on the command line."""
    if stdin:
        try:
            given = sys.stdin.readline().rstrip("\r\n")
        except UnicodeDecodeError:
            raise ConfigError("the password on standard input is not text in UTF-8") from None
        if not given:
            raise ConfigError("--password-stdin: there is no password on standard input")
        return given
    if not needed:
        return None
    if not sys.stdin.isatty():
        raise ConfigError("there is no terminal to ask for the password at; pipe it in with --password-stdin")
    given = getpass.getpass(f"Password of {login}: ", stream=sys.stderr)
    if getpass.getpass("The same again: ", stream=sys.stderr) != given:
        raise ConfigError("the two passwords differ; nothing was changed")
    return given
