"""The verdict on two sides' responses: generate.json for programs, report.txt and a few lines for readers."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parity.comparison.generations import (
    Difference,
    Gap,
    GenerationComparison,
    NextToken,
    Pair,
    Parting,
    ResponseComparison,
)
from parity.comparison.pair import NAMES
from parity.report.verdict import DIM, GREEN, PLAIN, RED, finite, number
from trainspec.plans.names import Policy

# Partings that the terminal shows; the report has all.
SHOWN = 5
# Characters of a prompt that a report shows.
PROMPT_WIDTH = 72
# A bound of a log-probability that lets it be another by a factor of e shows nothing of its token.
WIDE = 1.0


@dataclass(frozen=True)
class CloserLook:
    """The `sides` that departed, answering again with other `options`: what they differ in then; None if in nothing."""

    options: Sequence[str]
    sides: tuple[str, ...]
    difference: Difference | None

    def said(self) -> str:
        """What it shows."""
        who, how = " and ".join(self.sides), shlex.join(self.options)
        agrees = "agree" if len(self.sides) > 1 else "agrees"
        if self.difference is not None:
            where = f"prompt {self.difference.prompt + 1}, token {self.difference.position + 1}"
            away = {
                "--no-cache": "the cache alone is not to blame",
                "--batch": "the batch alone is not to blame",
            }
            return f"with {how} {who} still differ{'' if len(self.sides) > 1 else 's'}, first at {where}: {away[self.options[0]]}"
        blame = {
            "--no-cache": "the cache of keys and values is to blame, whole rows are right",
            "--batch": "what one row of a batch does to another is to blame: padding, or the positions of rows",
        }
        return f"with {how} {who} {agrees}: {blame[self.options[0]]}"


@dataclass(frozen=True)
class GenerationVerdict:
    """What was compared, and the result. `source` says whose prompts they were, `texts` what tokens look like.

    `arguments` are those of the command line that asks for the same, but for the precision.
    """

    precision: Policy
    labels: tuple[str, str]
    source: str
    pairs: Sequence[Pair]
    comparison: GenerationComparison
    looks: Sequence[CloserLook] = ()
    texts: Mapping[int, str] = field(default_factory=dict)
    arguments: Sequence[str] = ()

    @property
    def holds(self) -> bool:
        """Whether rounding explains all that differs."""
        return self.comparison.holds

    @property
    def word(self) -> str:
        """`pass` or `fail`."""
        return "pass" if self.holds else "fail"

    def write(self, out: Path) -> None:
        """Write generate.json and report.txt into `out`."""
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.as_json(), indent=2, ensure_ascii=False, allow_nan=False)
        (out / "generate.json").write_text(text + "\n", encoding="utf-8")
        (out / "report.txt").write_text("\n".join(self.report()) + "\n", encoding="utf-8")

    def as_json(self) -> dict[str, Any]:
        """The content of generate.json. Prompts and tokens are counted from 0; what is not a number is null."""
        comparison = self.comparison
        first, worst = comparison.first_difference, comparison.worst
        return {
            "verdict": self.word,
            "precision": self.precision,
            "left": self.labels[0],
            "right": self.labels[1],
            "prompts": self.source,
            "tokens_compared": comparison.compared,
            "tokens_left_out": comparison.left_out,
            "first_difference": vars(first) if first else None,
            "worst_log_probability": _gap(worst) if worst else None,
            "closer_looks": [
                {"options": list(look.options), "sides": look.sides, "agrees": look.difference is None}
                for look in self.looks
            ],
            "responses": [
                self._response(pair, response)
                for pair, response in zip(self.pairs, comparison.responses, strict=True)
            ],
            "notes": self.notes,
        }

    def _response(self, pair: Pair, response: ResponseComparison) -> dict[str, Any]:
        worst = max(response.gaps, key=lambda gap: gap.used, default=None)
        difference = response.first_difference
        return {
            "prompt": pair[0].prompt,
            "text": {name: side.text for name, side in zip(NAMES, pair, strict=True)},
            "tokens": dict(zip(NAMES, response.lengths, strict=True)),
            "agreed": response.agreed,
            "left_out": response.left_out,
            "worst_log_probability": _gap(worst) if worst else None,
            "parting": self._parting(response.parting) if response.parting else None,
            "difference": vars(difference) if difference else None,
        }

    def _parting(self, parting: Parting) -> dict[str, Any]:
        return {
            "position": parting.position,
            "explained_by_rounding": parting.is_explained,
            "drawn": parting.drawn,
            **{each.side: self._next_token(each) for each in parting.next_tokens},
        }

    def _next_token(self, each: NextToken) -> dict[str, Any] | None:
        if each.token is None:
            return None
        return {
            "token": each.token,
            "text": self.texts.get(each.token),
            "rival": each.rival,
            "margin": finite(each.margin),
            "distance": finite(each.reach.distance) if each.reach else None,
            "bound": finite(each.reach.bound) if each.reach else None,
            "explained_by_rounding": each.is_explained,
        }

    @property
    def notes(self) -> list[str]:
        """What a user should know besides the verdict."""
        notes, comparison = [], self.comparison
        if comparison.left_out:
            notes.append(
                f"{comparison.left_out} tokens after a parting are not compared: they have other tokens before them on each side"
            )
        gaps = [gap for response in comparison.responses for gap in response.gaps]
        if wide := sum(gap.bound >= WIDE for gap in gaps):
            notes.append(
                f"{wide / len(gaps):.1%} of the log-probabilities have a bound of {WIDE:g} or more in {self.precision}, which shows "
                "nothing of them"
            )
        if not comparison.compared:
            notes.append("no token is the same on both sides: give other prompts")
        return notes

    def lines(self, *, colour: bool) -> list[str]:
        """A summary for the terminal."""
        shade = (GREEN if self.holds else RED, PLAIN, DIM) if colour else ("", "", "")
        comparison, count = self.comparison, len(self.pairs)
        head = (
            f"{shade[0]}{self.word.upper()}{shade[1]}  {self.labels[0]}  vs  {self.labels[1]}  in {self.precision}, "
            f"{_counted(count, 'prompt')} ({self.source})"
        )
        same = sum(response.parting is None for response in comparison.responses)
        explained = sum(parting.is_explained for parting in comparison.partings)
        lines = [
            head,
            f"tokens             {same} of {_counted(count, 'response')} the same to the end, {comparison.compared} tokens compared",
        ]
        if comparison.partings:
            lines.append(
                f"partings           {explained} of {len(comparison.partings)} explained by rounding"
            )
        if worst := comparison.worst:
            lines.append(
                f"log-probabilities  worst error {number(worst.error)}, bound {number(worst.bound)}, used {number(worst.used)}; "
                f"{worst.side}, {_where(worst.prompt, worst.position)}"
            )
        first = comparison.first_difference
        if first:
            lines += [
                f"first difference: {_where(first.prompt, first.position)}, {' and '.join(first.sides)}: {first.what}",
                f"  {self._stage()}",
            ]
        wrong_first = sorted(comparison.partings, key=lambda p: p.is_explained)
        for parting in wrong_first[:SHOWN]:
            lines += self._told(parting)
        if len(wrong_first) > SHOWN:
            lines.append(f"and {len(wrong_first) - SHOWN} more partings in the report")
        lines += [f"  {look.said()}" for look in self.looks]
        return [*lines, *(f"note: {note}" for note in self.notes), *self._next()]

    def _stage(self) -> str:
        if self.comparison.first_tokens_agree:
            return "every first token agrees, a later one does not: the pass over the prompt is right, what differs is in decoding"
        return "a first token differs: the pass over the prompt does"

    def _told(self, parting: Parting) -> Iterator[str]:
        """What happened where the tokens part."""
        verdict = "rounding explains it" if parting.is_explained else "rounding does not explain it"
        drawn = "" if parting.drawn is None else f", {parting.drawn:.6f} drawn"
        yield f"parting: {_where(parting.prompt, parting.position)}{drawn}: {verdict}"
        unit = "" if parting.drawn is None else " of probability"
        for each in parting.next_tokens:
            if each.token is None:
                yield f"  {each.side:<5} the response has ended"
                continue
            said = f"  {each.side:<5} {self._token(each.token)}"
            if each.margin is not None and each.rival is not None:
                said += f", {each.margin:+.3g} to {self._token(each.rival)}"
            if each.reach:
                mark = "within" if each.is_explained else "over"
                said += (
                    f"; by the reference {number(each.reach.distance)}{unit} from being chosen, {mark} the bound "
                    f"{number(each.reach.bound)}"
                )
            yield said

    def _token(self, token: int) -> str:
        return f"{self.texts.get(token, '?')!r} ({token})"

    def _next(self) -> list[str]:
        """The command that comes next, and what it is for."""
        other, why = (
            ("fp64", "the same in float64, which sees what is smaller than rounding")
            if self.precision != "fp64"
            else ("fp32", "the same in the precision of a real run")
        )
        if not self.holds and self.precision == "fp64":
            check = ["parity", "check", *self._recipe_arguments, "--precision", "fp64"]
            return [
                f"next: {shlex.join(check)}  # whether training differs as well, and the activation that differs first"
            ]
        words = ["parity", "generate", *self.arguments, "--precision", other]
        return [f"next: {shlex.join(words)}  # {why}"]

    @property
    def _recipe_arguments(self) -> list[str]:
        """The recipe, its settings and the sides: what `parity check` has in common."""
        words, kept = list(self.arguments), []
        while words:
            word = words.pop(0)
            if not word.startswith("-"):
                kept.append(word)
            elif word in ("--set", "--left", "--right"):
                kept += [word, words.pop(0)]
            else:
                break
        return kept

    def report(self) -> list[str]:
        """The content of report.txt: the summary, and every response with where it parts."""
        lines = [*self.lines(colour=False), ""]
        for pair, response in zip(self.pairs, self.comparison.responses, strict=True):
            lines += [
                f"{response.prompt + 1}. {' '.join(pair[0].prompt.split())[:PROMPT_WIDTH]}",
                f"   {response.agreed} tokens agree, of {response.lengths[0]} left and {response.lengths[1]} right",
            ]
            texts = [side.text for side in pair]
            if texts[0] == texts[1]:
                lines.append(f"   both:  {texts[0]!r}")
            else:
                lines += [f"   {name + ':':<6} {text!r}" for name, text in zip(NAMES, texts, strict=True)]
            if response.parting:
                lines += [f"   {line}" for line in self._told(response.parting)]
            if difference := response.first_difference:
                lines.append(f"   differs: token {difference.position + 1}, {difference.what}")
        return lines


def _where(prompt: int, position: int) -> str:
    """As a reader counts."""
    return f"prompt {prompt + 1}, token {position + 1}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _gap(gap: Gap) -> dict[str, Any]:
    return {
        "prompt": gap.prompt,
        "position": gap.position,
        "side": gap.side,
        "error": finite(gap.error),
        "bound": finite(gap.bound),
        "bound_used": finite(gap.used),
    }
