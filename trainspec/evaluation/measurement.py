"""What is measured of one model: its held-out loss, its answers, and how probable it finds the answers that records offer."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

from tqdm import tqdm

from trainspec.data import Dataset
from trainspec.evaluation.choices import log_likelihood
from trainspec.evaluation.heldout import Question
from trainspec.evaluation.loss import heldout_examples, heldout_loss
from trainspec.generation.generation import Generation
from trainspec.generation.responder import Responder
from trainspec.step import S


@dataclass(frozen=True)
class Measurement:
    """Of one model: `generations` and the log-likelihoods of the choices are those of the questions, in their order."""

    whose: str
    step: int
    heldout_loss: float
    generations: tuple[Generation, ...] = ()
    log_likelihoods: tuple[tuple[float, ...], ...] = ()

    @property
    def perplexity(self) -> float:
        """Per target token; infinite where it is more than a number can be."""
        try:
            return math.exp(self.heldout_loss)
        except OverflowError:
            return math.inf

    @property
    def ended(self) -> int:
        """How many answers ended by themselves."""
        return sum(made.finish == "stop" for made in self.generations)


@dataclass(frozen=True)
class Measurer(Generic[S]):
    """Measures any state of a run. All processes do, with the same arguments; the leader shows how far it is."""

    responder: Responder[S]
    heldout: Dataset
    questions: Sequence[Question]
    is_leader: bool

    def measure(self, state: S, whose: str) -> Measurement:
        """Everything of one state, which stays as it is."""
        backend, run = self.responder.backend, self.responder.run
        loss = heldout_loss(backend, state, self.heldout, heldout_examples(run))
        if not self.questions:
            return Measurement(whose, state.step, loss)
        generations: list[Generation] = []
        is_shown = self.is_leader and sys.stderr.isatty()
        with tqdm(total=len(self.questions), desc=whose, unit="answer", disable=not is_shown) as bar:
            for made in self.responder.respond(state, [question.prompt for question in self.questions]):
                generations += made
                bar.update(len(made))
        likelihoods = tuple(
            tuple(log_likelihood(backend, state, run, choice) for choice in question.choices)
            for question in self.questions
        )
        return Measurement(whose, state.step, loss, tuple(generations), likelihoods)
