"""Who may sign in at a workspace's console, for a command that looks at them or changes them; and what people say."""

from __future__ import annotations

from collections.abc import Sequence

from components.contracts.errors import ConfigError
from components.machine import account
from flows.workspace.settings import read_settings
from flows.workspace.workspace import Workspace
from registry.accounts import Accounts, Token, User
from registry.approval import checked_name, plain_name
from registry.comments import Comments


def accounts(workspace: Workspace) -> Accounts:
    """The users of a workspace, with their tokens and the record of what they did."""
    return Accounts(read_settings(workspace.state).ledger_url)


def comments(workspace: Workspace) -> Comments:
    """What people said about the versions of a workspace."""
    return Comments(read_settings(workspace.state).ledger_url)


def acting(name: str | None) -> str:
    """Who does something, for the record: a name that is given, else the login of this machine's account."""
    if name is not None:
        return checked_name(name, "--as")
    told = account()
    return str(told["login"] or told["user"])


def also(of: User, *, add: Sequence[str], drop: Sequence[str]) -> list[str]:
    """The other names of a user with some more and some fewer; raises ConfigError for one that is to go and is not there."""
    there = {plain_name(name): name for name in of.also}
    for name in drop:
        if there.pop(plain_name(name), None) is None:
            raise ConfigError(f"{of.login} is not known as {name!r}; also known as: {', '.join(of.also) or '(nobody)'}")
    return [*there.values(), *add]


def token_of(users: Accounts, login: str, name: str) -> Token:
    """What is known of a user's token, the newest of this name."""
    wanted = (users.find(login).login, plain_name(name))
    return next(each for each in users.tokens() if (each.login, plain_name(each.name)) == wanted)
