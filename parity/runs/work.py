"""What a check is about to run, how long that may take, and what would make it cheaper.

The times are a guess from sizes, made before anything runs: floating-point operations over the speed of two cores as
`benchmarks/check_time.py` measured it, plus start-ups and compilations. They are right to about a factor of two; once
updates are made, `parity.runs.progress` goes by those.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from trainspec.cores import cores
from trainspec.plans.cost import width
from trainspec.plans.plan import STORED_DTYPE, Backend, Policy
from trainspec.runs.memory import available_memory
from trainspec.runs.run import Run

REFERENCE = "reference"
# Floating-point operations per second of one busy core (AMD EPYC with AVX2), of whole passes. torch has no bfloat16
# product for such a core but an emulated one; JAX widens to float32.
SPEED: dict[tuple[Backend, Policy], float] = {
    ("jax", "fp64"): 16e9,
    ("jax", "fp32"): 20e9,
    ("jax", "bf16"): 14e9,
    ("torch", "fp64"): 12e9,
    ("torch", "fp32"): 18e9,
    ("torch", "bf16"): 3e9,
}
# How much longer the reference takes with simulated roundings.
ROUNDED = 1.45
# Core seconds until the first pass: imports, tracing, compilation.
START: dict[Backend, float] = {"jax": 13.0, "torch": 11.0}
# The reference has two programs to compile: with and without roundings.
START_OF_REFERENCE = 25.0
# Core seconds to write and to compare a million elements of a trained weight for one update, over all groups of a trace.
WRITING, COMPARING, JUDGING = 0.25, 0.15, 0.9
# A guess is told as a range, up to this factor.
UNSURE = 2.0
# A cheaper check is worth a word if it takes at most this share.
WORTH_IT = 0.75
FEW_STEPS, SHORT_ROWS = 3, 64
# Bytes of a program that has loaded its framework, and of its arrays: a trace holds each trained weight's gradient, update,
# two moments, and the weights before and after on their way to the disk.
BASE_BYTES, TRACED_COPIES = 800 * 2**20, 6
# The arrays that a pass keeps for the backward pass, in widths of the residual stream, of the MLP, and of the vocabulary.
KEPT_STREAM, KEPT_MLP, KEPT_VOCABULARY = 16, 4, 4
# The share of the memory that is free which two sides at once may take.
MEMORY_SHARE = 0.6


@dataclass(frozen=True)
class Size:
    """What decides how long a pass over one global batch takes, and how much memory."""

    examples: int
    sequence_tokens: int
    slices: int
    parameters: int
    trained: int
    layers: int
    attention: int
    stream: int
    mlp: int
    vocabulary: int

    @property
    def operations(self) -> float:
        """Of a forward and a backward pass: six per weight and token, less where weights are frozen, and attention's."""
        tokens = self.examples * self.sequence_tokens
        products = 4 * self.parameters + 2 * self.trained
        return tokens * (products + 12.0 * self.layers * self.attention * self.sequence_tokens)

    def bytes_at_most(self, policy: Policy) -> float:
        """What one side needs: its state, the copies that go to the trace, and what an accumulation slice keeps."""
        each = width(STORED_DTYPE[policy])
        state = (self.parameters + 3 * self.trained) * each
        traced = TRACED_COPIES * self.trained * each
        heads = (
            self.examples
            / self.slices
            * self.layers
            * self.sequence_tokens**2
            * self.attention
            / self.stream
            * 4
        )
        tokens = self.examples / self.slices * self.sequence_tokens
        kept = (
            self.layers * (KEPT_STREAM * self.stream + KEPT_MLP * self.mlp)
            + KEPT_VOCABULARY * self.vocabulary
        )
        return BASE_BYTES + state + traced + (tokens * kept + heads) * each


def size_of(run: Run) -> Size:
    """The size of a run."""
    spec, recipe = run.spec, run.recipe
    return Size(
        recipe.batch.global_examples, recipe.data.sequence_tokens, recipe.batch.accumulation,
        sum(p.size for p in run.full_table), sum(p.size for p in run.trained), spec.layers,
        spec.heads * spec.head_dim, spec.embed, spec.mlp, spec.vocab,
    )  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What a check runs: `steps` updates on each side (label, backend), and with `draws` the float64 reference of both.

    `at_once`: the programs run at the same time. With `closer` the check has found a difference, and looks at the step again.
    How long it takes is guessed only `on_cores`.
    """

    recipe: str
    sides: tuple[tuple[str, Backend], tuple[str, Backend]]
    size: Size | None
    precision: Policy
    steps: int
    draws: int
    at_once: bool = False
    closer: bool = False
    on_cores: bool = True

    def passes(self, program: str) -> int:
        """How many updates a side makes, or how often the reference repeats one."""
        return self.steps * (2 + self.draws) if program == REFERENCE else self.steps

    def ends_with(self, programs: Collection[str]) -> bool:
        """Whether no program comes after these."""
        return len(programs) == 2 + bool(self.draws)

    @property
    def compared(self) -> str:
        """What is compared at the end."""
        return f"every tensor of {_count(self.steps, 'update')}"

    @property
    def core_seconds(self) -> float:
        """A guess at what all programs together compute."""
        if self.size is None:
            return 0.0
        each = self.size.operations * self.steps
        sides = sum(START[backend] + each / SPEED[backend, self.precision] for _, backend in self.sides)
        traced = self.size.trained / 1e6 * self.steps
        if not self.draws:
            return sides + traced * (2 * WRITING + COMPARING)
        passes = 2 + self.draws * ROUNDED
        return (
            sides
            + START_OF_REFERENCE
            + passes * each / SPEED["jax", "fp64"]
            + traced * (2 * WRITING + JUDGING)
        )

    def announcement(self) -> list[str]:
        """The lines that say what will run, how long it may take, and what would be cheaper; none for an unknown model."""
        if self.size is None:
            return []
        if self.closer:
            guess = f" (a guess: {self._guess()})" if self.on_cores else ""
            return [
                f"parity: they differ; looks closer: both sides again up to update {self.steps}, with its activations{guess}"
            ]
        size, (left, right) = self.size, (label for label, _ in self.sides)
        lines = [
            f"parity: {self.recipe}: {_count(self.steps, 'update')} of {size.examples} × {size.sequence_tokens} tokens on each side,"
            f" {_millions(size.trained)} of {_millions(size.parameters)} weights trained, in {self.precision}",
            f"parity: left ({left}) and right ({right})"
            f" {'at the same time' if self.at_once else 'one after the other'}{self._of_the_reference()}",
        ]
        if not self.on_cores:
            return lines
        lines.append(
            f"parity: a guess from sizes: {self._guess()} on {cores()} idle cores; where loss or gradients differ, at most as"
            " long again for a closer look"
        )
        if cheaper := [*self._cheaper()]:
            lines.append(f"parity: cheaper: {'; '.join(cheaper)}")
        return lines

    def _of_the_reference(self) -> str:
        if not self.draws:
            return ""
        return (
            f", and the float64 reference that bounds rounding: {self.passes(REFERENCE)} passes, as every update of both is"
            f" repeated, and the left one's {self.draws} times more with roundings"
        )

    def _guess(self) -> str:
        seconds = self.core_seconds / min(2, cores())
        return f"{in_words(seconds)} to {in_words(UNSURE * seconds)}"

    def _cheaper(self) -> Iterator[str]:
        """Settings that would save a quarter or more, each with its own guess."""
        size, options = self.size, {}
        assert size is not None
        if self.steps > FEW_STEPS:
            options[f"--steps {FEW_STEPS}"] = replace(self, steps=FEW_STEPS)
        if self.draws:
            options["--precision fp64, which is the proof and needs no draws,"] = replace(
                self, precision="fp64", draws=0
            )
        if size.sequence_tokens > SHORT_ROWS:
            options[f"--set data.sequence_tokens={SHORT_ROWS}"] = replace(
                self, size=replace(size, sequence_tokens=SHORT_ROWS)
            )
        for setting, work in options.items():
            if work.core_seconds <= WORTH_IT * self.core_seconds:
                yield f"{setting} takes {work.core_seconds / self.core_seconds:.0%} of that"


def fit_at_once(size: Size, policy: Policy, *, programs: int) -> bool:
    """Whether as many programs as that have memory, and a core each for two of them."""
    return cores() > 1 and programs * size.bytes_at_most(policy) <= MEMORY_SHARE * available_memory()


def in_words(seconds: float) -> str:
    """`40 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 600:
        return f"{whole // 60} min {whole % 60 // 10 * 10} s".replace(" 0 s", "")
    minutes = round(whole / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _millions(number: int) -> str:
    return f"{number / 1e6:.3g} M"
