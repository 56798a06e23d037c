"""`parity diff`: from two traces of any origin to a verdict and its report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, assert_never

from parity.comparison.compare import Comparison
from parity.comparison.estimated_bounds import EstimatedBounds
from parity.comparison.pair import Pair
from parity.comparison.phases import INITIAL_GROUPS
from parity.comparison.tolerance import Bounds, ProofBounds
from parity.diagnosis import diagnose
from parity.judging.judge import compare_sides, traces_of, write_report_of
from parity.report.verdict import Verdict
from parity.runs.sides import NAMES, SideResult
from trainspec.errors import UserError
from trainspec.plans.plan import Policy
from trainspec.trace import Trace
from trainspec.trace_header import HEADER_FILE, TraceHeader

Traces = tuple[Trace, Trace]
# From the coarsest to the finest.
_TYPES: tuple[tuple[str, Policy], ...] = (("bfloat16", "bf16"), ("float32", "fp32"), ("float64", "fp64"))
# How a message shortens a digest.
_DIGEST_CHARACTERS = 8


def diff(left: Path, right: Path, *, precision: Policy | None, out: Path | None) -> Verdict:
    """Judge two traces of any origin.

    `precision` None takes that of the headers; a trace without one has the type of its gradients, and the coarser of two
    counts. Raises UserError if the headers name two precisions, if a directory holds a whole check, or if the two traces
    share no name.
    """
    for path in (left, right):
        _refuse_a_check(path)
    traces = Trace(left), Trace(right)
    _share_names(*traces)
    results = [SideResult(trace) for trace in traces]
    precision = precision or _precision(traces)
    comparison = compare_sides(results, lambda pair: bounds_for(pair, precision, lora_scale=1.0))
    notes = (
        *_start_notes(comparison, precision),
        *_estimate_notes(comparison, precision),
        *_header_notes(traces),
    )
    notes = (*comparison.notes, *notes)
    comparison = replace(comparison, notes=notes)
    verdict = Verdict(precision, str(left), str(right), comparison, diagnose(comparison, traces_of(results)))
    if out:
        write_report_of(verdict, results, out, recipe=None, settings=(), recipes=())
    return verdict


def bounds_for(pair: Pair, precision: Policy, *, lora_scale: float) -> Bounds:
    """The bounds for two traces without a recipe: in fp32 and bf16 estimated, not measured."""
    match precision:
        case "fp64":
            return ProofBounds(pair)
        case "fp32" | "bf16":
            return EstimatedBounds(pair, precision, lora_scale=lora_scale)
        case other:
            assert_never(other)


def _refuse_a_check(path: Path) -> None:
    inside = [path / name / "trace" for name in NAMES]
    if all((trace / "trace.jsonl").is_file() for trace in inside):
        raise UserError(f"{path}: holds a check, not a trace; compare {inside[0]} with {inside[1]}")


def _share_names(left: Trace, right: Trace) -> None:
    """Raises one UserError for unrelated traces, of which every single location would be missing on one side."""
    names = [set(trace.initial_names()) for trace in (left, right)]
    if all(names) and not names[0] & names[1]:
        one, other = (min(each).removeprefix("weight/") for each in names)
        raise UserError(
            f"{left.directory} and {right.directory}: no weight has the same name in both ({one!r}, {other!r}); record them under common names"
        )


def _precision(traces: Traces) -> Policy:
    """The precision of both traces. Raises UserError if their headers name two."""
    stated = [trace.header.policy if trace.header else None for trace in traces]
    if all(stated) and stated[0] != stated[1]:
        raise UserError(
            f"{traces[0].directory} was made in {stated[0]}, {traces[1].directory} in {stated[1]}: two precisions are not the "
            "same training; give --precision to hold both to one of them"
        )
    each = [policy or _policy_of_types(trace) for policy, trace in zip(stated, traces, strict=True)]
    return next(policy for _, policy in _TYPES if policy in each)


def _policy_of_types(trace: Trace) -> Policy:
    """The precision of the coarsest gradients of a trace's first step."""
    dtypes = {
        str(trace.read(trace.first_step, key).dtype)
        for key in trace.names(trace.first_step)
        if key.startswith(("gradient/", "update/"))
    }
    for dtype, policy in _TYPES:
        if dtype in dtypes:
            return policy
    raise UserError(
        f"{trace.directory}: gradients of type {', '.join(sorted(dtypes)) or 'none'}; give --precision fp64, fp32 or bf16"
    )


def _start_notes(comparison: Comparison, precision: Policy) -> Iterator[str]:
    """Why two runs that resumed do not start alike."""
    steps = [f.location.step for f in comparison.findings if f.location.step]
    starts = [f for f in comparison.findings if f.location.phase in INITIAL_GROUPS]
    if precision != "fp64" and min(steps, default=1) > 1 and not all(f.holds for f in starts):
        yield (
            f"the runs resumed from two checkpoints, which rounding has taken apart: in {precision} only runs that resumed from "
            "one checkpoint can be compared"
        )


def _estimate_notes(comparison: Comparison, precision: Policy) -> Iterator[str]:
    """What bounds that are estimated, not measured, can and cannot show."""
    gradients = [f for f in comparison.findings if f.location.phase == "gradient" and f.elements]
    bounds = [(f.bound, f.location.step) for f in gradients if f.bound]
    if precision == "fp64" or not bounds:
        return
    (finest, first), (coarsest, last) = min(bounds), max(bounds)
    yield (
        f"the bounds are estimated from the traces alone: an error of a gradient shows from {finest:.1e} (step {first}) to "
        f"{coarsest:.1e} (step {last}) of it on, and a smaller one does not; a model that magnifies rounding "
        "more than a decoder-only transformer does may exceed them without a mistake; float64 traces are held to 1e-9"
    )


def _header_notes(traces: Traces) -> Iterator[str]:
    """What is not known of a trace without a header, and in what two headers differ besides where the runs computed."""
    headers = [trace.header or TraceHeader() for trace in traces]
    sides = list(zip(NAMES, headers, strict=True))
    if unknown := [name for name, header in sides if header.identity and not header.policy]:
        yield (
            f"{HEADER_FILE} states no policy in {' and '.join(unknown)}: the type of the gradients stands for the precision"
        )
    if unknown := [name for name, header in sides if not header.identity]:
        yield (
            f"no header ({HEADER_FILE}) states policy and identity in {' and '.join(unknown)}: the type of the gradients stands "
            "for the precision, and method, tokenizer, plan and versions are not known"
        )
    left, right = (_stated(header) for header in headers)
    differing = [key for key in left if right.get(key, left[key]) != left[key]]
    if differing:
        yield f"the headers differ: {', '.join(f'{key} {left[key]} and {right[key]}' for key in differing)}"


def _stated(header: TraceHeader) -> Mapping[str, str]:
    """What a header states that must be the same on both sides, in words."""
    single: dict[str, Any] = {"policy": header.policy, "reduce": header.reduce}
    # A method's directory may be anywhere; the digest of its content is in the identity.
    method = {f"method.{key}": value for key, value in header.method.items() if key != "adapter"}
    digests = {f"{key} (digest)": digest[:_DIGEST_CHARACTERS] for key, digest in header.identity.items()}
    return {key: str(value) for key, value in (single | method | digests).items() if value is not None}
