"""Commands about versions of the data: what differs, which there were, and classes that get other names."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.contracts.errors import ConfigError
from components.contracts.wording import counted, is_text
from flows.cli.answers import HERE, AsJson, Commands, InWorkspace, finish

if TYPE_CHECKING:
    from components.history import Compared, Version
    from flows.workspace.differences import LoggedVersion

_SHOWN = 5


def data_diff(
    before: Annotated[str, typer.Argument(help="A git revision, a data version's hash, pinned, or now.")] = "pinned",
    after: Annotated[str, typer.Argument(help="The same; now is what lies in data/.")] = "now",
    html: Annotated[Path | None, typer.Option(help="Write a page with thumbnails to this file.")] = None,
    pictures: Annotated[int, typer.Option(min=0, max=500, help="Thumbnails under each heading of the page.")] = 24,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Show what differs between two versions: files, labels, classes, test pictures. Exit status 1 when they differ."""
    from flows.terminal import Console
    from flows.workspace.differences import compare
    from flows.workspace.workspace import Workspace

    def look(compared: Compared, read: Callable[[str, str], bytes | str]) -> None:
        if html is not None:
            from flows.pages.differences import render

            _write(html, render(compared, read, most_pictures=pictures))

    with Console(1, quiet=json_) as console, console.stage("comparing", 1) as (progress, _):
        compared = compare(Workspace.find(workspace), before, after, look=look, progress=progress)
    answer = {**_compared_json(compared), "page": None if html is None else str(html)}
    lines = [*_compared_text(compared), *([f"Page: {html}"] if html is not None else [])]
    finish(answer, json_, lambda: "\n".join(lines))
    if compared.differs:
        raise typer.Exit(1)


def _write(path: Path, text: str) -> None:
    from components.store import write_atomically

    try:
        write_atomically(path, text.encode())
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            raise
        raise ConfigError(f"{path} cannot be written ({error.strerror}); name another file with --html FILE") from error


def _version_json(version: Version) -> dict[str, Any]:
    commit = version.commit
    return {
        "given": version.given,
        "data_version": version.dvc_hash,
        "files": version.num_files,
        "bytes": version.bytes,
        "commit": commit.id if commit else None,
        "author": commit.author if commit else None,
        "at": commit.at if commit else None,
        "message": commit.message if commit else None,
    }


def _compared_json(compared: Compared) -> dict[str, Any]:
    from components.data_folder import DATA

    found, test = compared.found, compared.test

    def moved(files: Iterable[Any]) -> list[dict[str, str]]:
        return [{"before": f"{DATA}/{one.before}", "after": f"{DATA}/{one.after}"} for one in files]

    def named(paths: Iterable[str]) -> list[str]:
        return [f"{DATA}/{path}" for path in paths]

    answer: dict[str, Any] = {
        "before": _version_json(compared.before),
        "after": _version_json(compared.after),
        "differs": compared.differs,
        "problem": compared.problem,
    }
    if found is not None:
        answer |= {
            "added": named(found.added),
            "removed": named(found.removed),
            "changed": named(found.changed),
            "relabelled": moved(found.relabelled),
            "renamed": moved(found.renamed),
            "renamed_classes": [
                {"old": one.old, "new": one.new, "files": one.num_files, "recorded": one.recorded}
                for one in found.renamed_classes
            ],
            "classes_before": found.class_counts_before,
            "classes_after": found.class_counts_after,
        }
    answer["test"] = {
        "joined": named(test.joined),
        "left": named(test.left),
        "relabelled": named(test.relabelled),
        "changed": named(test.changed),
        "undecided": named(test.undecided),
        "rewritten": test.rewritten,
        "problem": test.problem,
    }
    answer["not_here"] = [{"file": f"{DATA}/{path}", "reason": why} for path, why in compared.not_here.items()]
    return answer


def _compared_text(compared: Compared) -> Iterator[str]:
    for version in (compared.before, compared.after):
        told = f", {_who(version)}" if version.commit else ""
        yield f"{version.given}: {version.dvc_hash}, {counted(version.num_files, 'file')}{told}"
    found, test = compared.found, compared.test
    if found is None:
        yield f"Which files differ is not known: {compared.problem}." if compared.differs else "Nothing differs."
        return
    if not compared.differs:
        yield "Nothing differs."
        return
    for one in found.renamed_classes:
        told = "" if one.recorded else f"; so it looks, `visionloop data rename-class {one.old} {one.new}` records it"
        yield f"class renamed: {_line(one.old)} -> {_line(one.new)} ({counted(one.num_files, 'file')}{told})"
    files = {
        "relabelled": [f"{one.before} -> {one.after}" for one in found.relabelled],
        "renamed": [f"{one.before} -> {one.after}" for one in found.renamed],
        "changed": list(found.changed),
        "added": list(found.added),
        "removed": list(found.removed),
    }
    for kind, names in files.items():
        if names:
            yield f"{kind}: {len(names)} ({_some(names)})"
    for told, paths in (
        ("relabelled, and every model is judged on these by the new label", test.relabelled),
        ("added", test.joined),
        ("removed", test.left),
        ("changed in place", test.changed),
    ):
        if paths:
            yield f"{counted(len(paths), 'test picture')} {told}: {_some(paths)}"
    if test.undecided:
        yield f"{counted(len(test.undecided), 'picture')} not decided to be test or not; `visionloop data add` does"
    if test.rewritten:
        yield f"{counted(test.rewritten, 'picture')} changed between test and the rest, which no command of visionloop does"
    if test.problem:
        yield f"Test pictures: {test.problem}"
    yield from _balance(compared)
    if compared.not_here:
        path, why = next(iter(compared.not_here.items()))
        told = f"{counted(len(compared.not_here), 'file')} ({_line(path)}: {why})"
        yield f"Not looked at: {told}, so whether these are test is not known"


def _balance(compared: Compared) -> Iterator[str]:
    from components.differences import balance

    assert compared.found is not None
    rows = [row for row in balance(compared.found) if row.before != row.after]
    for row in rows[:20]:
        yield (
            f"class {_line(row.name)}: {row.before} -> {row.after} files, {100 * row.share_before:.1f} % -> "
            f"{100 * row.share_after:.1f} %"
        )
    if len(rows) > 20:
        yield f"and {len(rows) - 20} more classes"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(_line(name) for name in names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _line(text: str) -> str:
    """Text of others on one line of a terminal."""
    return "".join(character if is_text(character) else " " for character in text)


def _who(version: Version) -> str:
    commit = version.commit
    if commit is None:
        return "not committed"
    return _line(f"{commit.at[:16].replace('T', ' ')} {commit.author}: {commit.message.partition(chr(10))[0]}")


def data_log(
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="At most so many.")] = 20,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """List the versions that git knows, newest first: who made them, why, and what changed; also one not committed yet."""
    from flows.workspace.differences import log
    from flows.workspace.workspace import Workspace

    found = list(log(Workspace.find(workspace), number))
    rows = [
        {
            **_version_json(one.version),
            "committed": one.version.commit is not None,
            "classes": None if one.classes is None else list(one.classes),
            "changes": one.counts,
            "problem": one.problem,
        }
        for one in found
    ]
    finish({"versions": rows}, json_, lambda: "\n".join(map(_logged, found)) or "No version so far: `visionloop data add`")


def _logged(one: LoggedVersion) -> str:
    version = one.version
    classes = "" if one.classes is None else f", {counted(len(one.classes), 'class')}"
    if one.counts is None:
        changed = f"  {one.problem}" if one.problem else "  the first one"
    else:
        told = [
            f"{counted(count, 'class')} renamed" if kind == "renamed_classes" else f"{count} {kind}"
            for kind, count in one.counts.items()
            if count
        ]
        changed = f"  {', '.join(told) or 'no file changed'}"
    return (
        f"{version.dvc_hash[:12] or '(unreadable)'}  {_who(version)}\n"
        f"  {counted(version.num_files, 'file')}{classes}\n{_line(changed)}"
    )


def data_rename_class(
    old: Annotated[str, typer.Argument(help="The class as it is called.")],
    new: Annotated[str, typer.Argument(help="What it is to be called.")],
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Give a class another name and pin that, so that models which know the old name stay comparable."""
    from flows.workspace.renaming import rename_class
    from flows.workspace.workspace import Workspace

    done = rename_class(Workspace.find(workspace), old, new)
    files = counted(done.num_files, "file")
    finish(
        {"data_version": done.version.dvc_hash, "old": old, "new": new, "files": done.num_files},
        json_,
        lambda: (
            f"Class {old!r} ({files}) is {new!r} in data version {done.version.dvc_hash}"
            + (", and was before" if done.was_done else f"\nNext: git commit -m 'Class {old} is called {new}'")
        ),
    )


def add_data_version_commands(data_app: Commands) -> None:
    data_app.command("diff")(data_diff)
    data_app.command("log")(data_log)
    data_app.command("rename-class")(data_rename_class)
