"""What a comparison of responses is about to run, as `parity.runs.work` says it of a check. How long that takes is not guessed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

# What a closer look changes, by the option that it adds to `generate`.
WITHOUT_CACHE, ONE_AT_A_TIME = ("--no-cache",), ("--batch", "1")
_LOOKS = {WITHOUT_CACHE: "on whole rows", ONE_AT_A_TIME: "one prompt at a time"}


@dataclass(frozen=True)
class Answers:
    """`prompts` of a `recipe` that the sides (name, label) answer, and the float64 reference with its `draws` after them.

    `at_once`: the sides run at the same time. `option`: that of a closer look, in which only some sides answer again.
    """

    recipe: str
    sides: Sequence[tuple[str, str]]
    prompts: int
    max_tokens: int
    precision: str
    draws: int
    at_once: bool
    option: tuple[str, ...] | None = None

    def passes(self, program: str) -> int:
        """How many responses a program makes or goes through: all of them."""
        return self.prompts

    def ends_with(self, programs: Collection[str]) -> bool:
        """Whether no program comes after these."""
        return len(programs) == len(self.sides) + 1

    @property
    def compared(self) -> str:
        """What is compared at the end."""
        return f"every token of {self._responses}"

    def announcement(self) -> list[str]:
        """The lines that say what will run."""
        if self.option:
            again = " and ".join(name for name, _ in self.sides)
            return [
                f"parity: they differ; looks closer: {again} again, {_LOOKS[self.option]} ({' '.join(self.option)})"
            ]
        each = " each" * (self.prompts != 1)
        how = "at the same time" if self.at_once else "one after the other"
        draws = f", and {self.draws} times more with roundings" * bool(self.draws)
        return [
            f"parity: {self.recipe}: {self._responses} of at most {self.max_tokens} tokens{each} on each side, in {self.precision}",
            f"parity: {' and '.join(f'{name} ({label})' for name, label in self.sides)} {how}, then the float64 reference: "
            f"every response once{draws}",
        ]

    @property
    def _responses(self) -> str:
        return f"{self.prompts} response{'s' * (self.prompts != 1)}"
