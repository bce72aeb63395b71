"""Every error of visionloop, and how an error is told in a line.

Exceptions::

    VisionloopError                 something is wrong that a person can act on
    ├── ConfigError (ValueError)    a recipe, an override or a command-line value
    │   ├── UnknownName             a plug-in, class or key that does not exist; lists the valid ones
    │   └── PluginFailed            a workspace's own plug-in cannot be used, raised, or answered something else
    ├── DataError                   the images or their version
    │   ├── UndecodableImage        one file is not an image we accept; the reason is its message
    │   ├── DataDiffers             the folder is not what data.dvc says
    │   └── DataRejected            validation refused the data set
    ├── StoreError                  an artefact could not be written or read
    │   ├── TamperedArtefact        bytes differ from the digests in their manifest
    │   └── SchemaTooNew            written by a newer visionloop
    ├── WorkspaceBusy               another run holds this workspace
    ├── StudyBusy                   another search holds this study
    ├── TrainingDiverged            the loss is not finite
    ├── WorkerLost                  a process that trained with others ended before its end
    ├── PassFailed                  a pass could not change the network, or left it unable to answer
    ├── CheckpointMismatch          a checkpoint belongs to another config or other data
    ├── ExportError                 a target could not build its engine
    ├── EngineUnavailable           an engine cannot be executed on this machine
    ├── WeightsUnavailable          pretrained weights could not be had
    ├── RegistryUnavailable         MLflow, the ledger or the release store does not answer
    ├── ClusterUnavailable          the Ray cluster that is named does not answer, has no room, or cannot train
    ├── OrchestratorUnavailable     the Prefect server that is named does not answer
    ├── DecisionRefused             the ledger's rules do not allow this approval, rejection, promotion or rollback
    ├── SignInRefused               login or password is wrong, or the user may not sign in
    ├── TooManyTries                too many sign-ins were refused, or come at once, for another one to be looked at now
    └── MonitoringError             a window of predictions cannot be judged
        └── ReferenceUnavailable    what production is compared with is missing, changed or another encoder's
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Sequence


class VisionloopError(Exception):
    """Something is wrong that a person can act on; the message says what, what was expected and what to do."""


class ConfigError(VisionloopError, ValueError):
    """A recipe, an override or a command-line value is not valid."""


class UnknownName(ConfigError):
    """A name that nothing carries."""

    def __init__(self, what: str, name: str, valid: Sequence[str]) -> None:
        super().__init__(f"unknown {what} {name!r}; valid: {', '.join(sorted(valid)) or '(none)'}")


class PluginFailed(ConfigError):
    """A workspace's own plug-in cannot be loaded or used, raised, or answered what its family does not."""

    method: str = ""
    """The method whose answer it was, where one is known."""


class DataError(VisionloopError):
    """The images, or the version that pins them, are not usable."""


class UndecodableImage(DataError):
    """One file is not an image we accept; the message is the reason."""


class DataDiffers(DataError):
    """The data folder is not what data.dvc pins."""


class DataRejected(DataError):
    """Validation refused the data set."""


class StoreError(VisionloopError):
    """An artefact could not be written or read."""


class TamperedArtefact(StoreError):
    """Bytes on disk differ from the digests in their manifest."""


class SchemaTooNew(StoreError):
    """A record was written by a newer visionloop."""


class WorkspaceBusy(VisionloopError):
    """Another run holds this workspace."""


class StudyBusy(VisionloopError):
    """Another search holds this study."""


class WorkerLost(VisionloopError):
    """A process that trained with others ended before its end."""


class TrainingDiverged(VisionloopError):
    """The training loss is not finite."""


class PassFailed(VisionloopError):
    """A pass could not do what it was asked to a network, or left it unable to answer; nothing of it is kept."""


class CheckpointMismatch(VisionloopError):
    """A training checkpoint belongs to another config or other data."""


class ExportError(VisionloopError):
    """A target could not build its engine."""


class EngineUnavailable(VisionloopError):
    """An engine cannot be executed on this machine."""


class SourceUnavailable(DataError):
    """The files of a source of images are not here and could not be had."""


class WeightsUnavailable(VisionloopError):
    """Pretrained weights could not be had."""


class RegistryUnavailable(VisionloopError):
    """MLflow, the ledger or the release store does not answer."""


class ClusterUnavailable(VisionloopError):
    """The Ray cluster that the environment names does not answer, has no room, or has a machine that cannot train."""


class OrchestratorUnavailable(VisionloopError):
    """The Prefect server that the environment names does not answer, or does not take our credential."""


class DecisionRefused(VisionloopError):
    """The ledger's rules do not allow this approval, rejection, promotion or rollback."""


class SignInRefused(VisionloopError):
    """Login or password is wrong, or the user may not sign in; which of these is not told."""


class TooManyTries(VisionloopError):
    """Too many sign-ins were refused, or come at once; from `again_at` on another one is looked at."""

    def __init__(self, message: str, again_at: datetime.datetime) -> None:
        super().__init__(message)
        self.again_at = again_at


class MonitoringError(VisionloopError):
    """A window of predictions cannot be judged."""


class ReferenceUnavailable(MonitoringError):
    """The reference sample of a release is missing, changed or another encoder's."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on, each once; groups are told by their first."""
    seen: set[int] = set()
    queue = [error]
    while queue:
        link = queue.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        queue += link.exceptions[:1] if isinstance(link, BaseExceptionGroup) else []
        original = getattr(link, "orig", None)  # SQLAlchemy's, beside the cause
        queue += [other for other in (original, link.__cause__, link.__context__) if isinstance(other, BaseException)]


def in_short(error: BaseException) -> str:
    """Kind and first line of an error, as short as a sentence bears."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


_SECRET = re.compile(r"(?<=://)[^/?#\s'\"]*:[^/?#\s'\"]*(?=@)")
"""User and password of an address."""


def redacted(text: str) -> str:
    """A text without the passwords of the addresses in it."""
    return _SECRET.sub("***", text)
