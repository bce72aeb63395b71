"""Gating: Evaluations and Measurements -> Verdict. Pure, and closed by default.

No gate configured, an engine that was not executed, an empty or non-finite value, a missing reference: none of these is
ever a pass. A rejected model is a value of this stage, not an exception.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field

from components import plugins
from components.answer_tables import answers_of, beyond_test_of, corrupted_of, slices_of
from components.choosing import AUTO, Choice, Limits, Offer, choose
from components.contracts.data import Renames, names_after
from components.contracts.families import Answers, Corrupted, Evidence, Gate, Least, Task
from components.contracts.models import Engine
from components.contracts.records import Record, Stored, canonical_json, sha256_text
from components.contracts.verdicts import (
    EngineVerdict,
    Evaluation,
    Finding,
    FindingStatus,
    Measurement,
    Robustness,
    SliceTable,
    Verdict,
    VerdictStatus,
    shared_classes,
)
from components.intervals import paired_difference


class GateConfig(Record):
    """One gate, with thresholds for all engines or for those it names."""

    gate: str
    settings: dict[str, Any] = {}
    engines: tuple[str, ...] = ()
    """Names of the engines it judges; empty for all."""


class GatingConfig(Record):
    """The gate policy. Its digest is part of what an approval is bound to."""

    gates: tuple[GateConfig, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Champion:
    """Today's champion: its engine, and what that answered on the test images."""

    engine: Engine
    evaluation: Stored[Evaluation]
    renamed: Renames = ()
    """Classes that were renamed since it was trained."""
    corrupted: Stored[Robustness] | None = None
    """What it answered on corrupted test images, where it was asked."""

    @property
    def classes(self) -> tuple[str, ...]:
        """All that it knows, by their names of today."""
        return names_after(self.engine.classes, self.renamed)


@dataclass(frozen=True)
class Judged:
    """One engine with everything that was found out about it."""

    engine: Stored[Engine]
    evaluation: Stored[Evaluation]
    measurement: Measurement | None
    required: bool


def check(config: GatingConfig, engine_names: Sequence[str], *, robustness_images: int) -> None:
    """Raise ConfigError for an unknown gate, setting or engine, or one without its evidence, before any work is done."""
    from components.contracts.errors import ConfigError, UnknownName

    for chosen in config.gates:
        gate = plugins.load("gates", chosen.gate, chosen.settings)
        least_corrupted = _least_corrupted(gate)
        if robustness_images < least_corrupted:
            raise ConfigError(
                f"gate {chosen.gate!r} can pass on {least_corrupted} corrupted images or more, and "
                f"evaluation.robustness_images is {robustness_images}: raise it, or leave the gate out"
            )
        for name in chosen.engines:
            if name not in engine_names:
                raise UnknownName(f"engine in gate {chosen.gate!r}", name, engine_names)


def _least_corrupted(gate: Gate) -> int:
    """The fewest corrupted images with which a gate can pass; 0 for one that looks at none."""
    if not getattr(gate, "needs_corrupted", False):
        return 0
    needs = getattr(gate, "least", None)
    return max(1, (needs().images or 1) if needs is not None else 1)


def judge(
    judged: Sequence[Judged],
    reference: Stored[Evaluation] | None,
    champion: Champion | None,
    config: GatingConfig,
    task: Task,
    *,
    serving: str,
    champion_known: bool,
    limits: Limits | None = None,
    absent: Mapping[str, tuple[str, bool]] | None = None,
    slices: Stored[SliceTable] | None = None,
    corrupted: Sequence[Stored[Robustness]] = (),
    unserved: Mapping[str, Finding] | None = None,
) -> Verdict:
    """One EngineVerdict per engine, and what follows for the candidate as a whole.

    The candidate passes when the serving engine and every required engine passed. One that cannot run here, or could not
    even be built (`absent`: name to reason and whether it is required), is `not executed here`, which is no pass: mark
    engines that are built here for other machines as not required. Where `serving` is `auto`, the serving engine is the one
    that `components/choosing.py` takes within `limits`, and a finding of each engine that passed says why. One engine in
    fp32 that was shown `corrupted` images stands for all that were built in fp32 of the same checkpoint. `unserved` are
    engines whose release a server could not serve, with what came of it, which stands with what the gates said of them.
    """
    gates: list[tuple[GateConfig, Gate]] = [(g, plugins.load("gates", g.gate, g.settings)) for g in config.gates]
    reference_answers = answers_of(reference, judged[0].engine.record.classes, task) if judged else None
    reference_beyond_test = beyond_test_of(reference, task)
    champion_answers, champion_missing = _answers_of_champion(champion, judged, task)
    known_slices = slices_of(slices)
    champion_corrupted = _corrupted_of_champion(champion, champion_answers, task)
    verdicts = []
    for item in judged:
        engine = item.engine.record
        findings: list[Finding] = []
        if item.evaluation.record.engine_digest != engine.digest():
            findings = [_finding("evaluation", "inconclusive", "the evaluation is of another engine")]
        elif item.evaluation.record.status != "evaluated":
            findings = [_finding("evaluation", "not executed here", item.evaluation.record.reason)]
        else:
            evidence = Evidence(
                engine=engine,
                evaluation=item.evaluation.record,
                measurement=item.measurement,
                answers=answers_of(item.evaluation, engine.classes, task),
                reference=reference_answers,
                beyond_test=beyond_test_of(item.evaluation, task),
                reference_beyond_test=reference_beyond_test,
                champion=champion_answers,
                champion_known=champion_known and not champion_missing,
                champion_missing=champion_missing,
                headline=task.headline,
                champion_classes=champion.classes if champion is not None else (),
                slices=known_slices,
                corrupted=_corrupted(item, judged, corrupted, task),
                champion_corrupted=champion_corrupted,
            )
            findings = [gate.judge(evidence) for g, gate in gates if not g.engines or engine.name in g.engines]
        if unserved and engine.name in unserved:
            findings = [*findings, unserved[engine.name]]
        verdicts.append(
            EngineVerdict(
                engine=engine.name,
                engine_digest=engine.digest(),
                required=item.required,
                serving=engine.name == serving,
                status=combined(findings),
                findings=tuple(findings),
            )
        )
    for name, (reason, required) in (absent or {}).items():
        finding = _finding("export", "not executed here", reason)
        verdicts.append(
            EngineVerdict(
                engine=name,
                engine_digest="",
                required=required,
                serving=name == serving,
                status="not executed here",
                findings=(finding,),
            )
        )
    policy_digest = _policy_digest(config, verdicts, limits if serving == AUTO else None)
    if serving != AUTO:
        return _decide(verdicts, serving, policy_digest)
    choice = choose(list(_offers(judged, verdicts, reference_answers, task)), limits or Limits())
    chosen = [_as_chosen(verdict, choice) for verdict in verdicts]
    return _decide(chosen, choice.engine, policy_digest, none_passed=not any(v.status == "pass" for v in verdicts))


def _offers(
    judged: Sequence[Judged], verdicts: Sequence[EngineVerdict], reference: Answers | None, task: Task
) -> Iterator[Offer]:
    for item, verdict in zip(judged, verdicts, strict=False):
        answers = answers_of(item.evaluation, item.engine.record.classes, task)
        drop = None
        if reference is not None and answers is not None and answers.image_ids == reference.image_ids:
            drop = paired_difference(reference.right, answers.right)
        measured = item.measurement
        if measured is not None and measured.engine_digest != item.engine.record.digest():
            measured = None
        yield Offer(
            verdict.engine,
            verdict.status == "pass",
            is_undecided=verdict.status == "inconclusive",
            p50_ms=measured.latency_p50_ms if measured else None,
            rounds_p50_ms=measured.rounds_p50_ms if measured else (),
            p99_ms=measured.latency_p99_ms if measured else None,
            size_mb=item.engine.record.size_bytes / 1e6,
            memory_mb=measured.memory_mb if measured else None,
            drop=drop,
        )


def _as_chosen(verdict: EngineVerdict, choice: Choice) -> EngineVerdict:
    """With what the choice says of it. An engine that comes nearest to the limits and misses one fails by that."""
    is_chosen, findings = verdict.engine == choice.engine, verdict.findings
    if (told := choice.told.get(verdict.engine)) is not None:
        status: FindingStatus = "not applicable"
        if is_chosen:
            # One that is undecided itself is not failed by a limit that it misses, and no exception can let it serve.
            missed: FindingStatus = "fail" if verdict.status == "pass" else "inconclusive"
            status = "pass" if choice.is_servable else missed
        findings = (*findings, _finding("serving", status, told))
    return verdict.model_copy(update={"serving": is_chosen, "findings": findings, "status": combined(findings)})


def _policy_digest(config: GatingConfig, verdicts: Sequence[EngineVerdict], limits: Limits | None) -> str:
    """All that decides besides the evidence: thresholds with defaults, the gates' code, what serves, what is required.

    With `limits` what serves is chosen, and they say by what.
    """
    return sha256_text(
        canonical_json(
            [
                config.to_json(),
                policy(config),
                [plugins.member_digest("gates", chosen.gate) for chosen in config.gates],
                [[verdict.engine, verdict.serving, verdict.required] for verdict in verdicts],
                *([limits.to_json()] if limits is not None else []),
            ]
        )
    )


def combined(findings: Sequence[Finding]) -> VerdictStatus:
    """What the findings of one engine come to."""
    statuses = {finding.status for finding in findings}
    if "fail" in statuses:
        return "fail"
    if "not executed here" in statuses:
        return "not executed here"
    # `not applicable` alone is no evidence: at least one gate has to have passed.
    return "pass" if "pass" in statuses and statuses <= {"pass", "not applicable"} else "inconclusive"


def _decide(verdicts: Sequence[EngineVerdict], serving: str, policy_digest: str, *, none_passed: bool = False) -> Verdict:
    """With `none_passed` there was a choice and nothing to choose: each engine's reasons are told."""
    deciding = [v for v in verdicts if v.serving or v.required]
    reasons = ["there is no engine to serve: none passed every gate"] if none_passed else []
    reasons += [
        f"{verdict.engine}: {finding.gate}: {finding.message}"
        for verdict in (verdicts if none_passed else deciding)
        for finding in verdict.findings
        if finding.status not in ("pass", "not applicable")
    ]
    statuses = {verdict.status for verdict in deciding}
    if not none_passed and not any(verdict.serving for verdict in verdicts):
        reasons.append(f"the serving engine {serving} was not judged")
    for verdict in deciding:
        if not any(finding.status == "pass" for finding in verdict.findings):
            reasons.append(f"{verdict.engine}: no gate passed, and without evidence nothing is approved")
    if "fail" in statuses:
        status = "fail"
    else:
        status = "inconclusive" if reasons or statuses != {"pass"} else "pass"
    return Verdict.model_validate(
        {
            "status": status,
            "serving_engine": serving,
            "engines": tuple(verdicts),
            "reasons": tuple(reasons),
            "policy_digest": policy_digest,
        }
    )


def _finding(gate: str, status: FindingStatus, message: str) -> Finding:
    return Finding(gate=gate, status=status, message=message)


def _answers_of_champion(champion: Champion | None, judged: Sequence[Judged], task: Task) -> tuple[Answers | None, str]:
    """The champion's answers, or why there are none although there is a champion."""
    if champion is None:
        return None, ""
    record = champion.evaluation.record
    if record.engine_digest != champion.engine.digest():
        return None, "its evaluation is of another engine"
    classes = judged[0].engine.record.classes if judged else ()
    answers = answers_of(champion.evaluation, shared_classes(classes, champion.classes), task)
    if answers is not None:
        return answers, ""
    here = {"not executed here": "its engine cannot be executed here: ", "not comparable": "", "evaluated": ""}
    return None, here[record.status] + (record.reason or "it gave no answers on the test images")


def _corrupted(
    item: Judged, judged: Sequence[Judged], corrupted: Sequence[Stored[Robustness]], task: Task
) -> Corrupted | None:
    """What an engine answered on corrupted images, or, in fp32, another one of the same checkpoint; None where none did."""
    asked = {stored.record.engine_digest: stored for stored in corrupted}
    engine = item.engine.record
    alike = [
        other.engine.record.digest()
        for other in judged
        if engine.precision == other.engine.record.precision == "fp32"
        and engine.checkpoint_digest == other.engine.record.checkpoint_digest
    ]
    found = next((asked[digest] for digest in (engine.digest(), *alike) if digest in asked), None)
    if found is None:
        return None
    if found.record.test_digest != item.evaluation.record.test_digest:
        return Corrupted({}, "they are of another test split")
    answers = corrupted_of(found, engine.classes, task)
    own = found.record.engine_digest == engine.digest()
    return answers if own else replace(answers, asked=found.record.engine)


def _corrupted_of_champion(champion: Champion | None, answers: Answers | None, task: Task) -> Corrupted | None:
    if champion is None or champion.corrupted is None or answers is None:
        return None
    if champion.corrupted.record.engine_digest != champion.engine.digest():
        return Corrupted({}, "they are of another engine")
    return corrupted_of(champion.corrupted, answers.classes, task)


def least(config: GatingConfig) -> dict[str, Least]:
    """The fewest test images with which each gate can pass, by its name; of the gates that say so."""
    found = {}
    for chosen in config.gates:
        needs = getattr(plugins.load("gates", chosen.gate, chosen.settings), "least", None)
        if needs is not None:
            found[chosen.gate] = needs()
    return found


def counting_test_images(config: GatingConfig) -> set[str]:
    """The gates that count test images as they are, and that more of them would decide; not those that corrupt them."""
    loaded = {chosen.gate: plugins.load("gates", chosen.gate, chosen.settings) for chosen in config.gates}
    return {name for name in least(config) if not _least_corrupted(loaded[name])}


def policy(config: GatingConfig) -> Mapping[str, Any]:
    """The gate policy with every default written out, for the evidence."""
    return {
        f"{index}:{chosen.gate}": plugins.load("gates", chosen.gate, chosen.settings).model_dump(mode="json")
        for index, chosen in enumerate(config.gates)
    }
