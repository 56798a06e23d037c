"""The command `eval`: the model that a run starts from and its newest checkpoint, measured on the held-out records."""

from __future__ import annotations

from pathlib import Path

from trainspec.checkpoints.newest import STARTING, newest_checkpoint, newest_state, restored
from trainspec.checkpoints.verify import verify_together
from trainspec.data import Dataset, open_dataset
from trainspec.errors import UserError
from trainspec.evaluation import files
from trainspec.evaluation.evaluation import Evaluation, task_of
from trainspec.evaluation.heldout import Questions, questions_of
from trainspec.evaluation.loss import heldout_examples, heldout_loss
from trainspec.evaluation.measurement import Measurer
from trainspec.evaluation.request import EvaluationRequest
from trainspec.evaluation.table import table
from trainspec.generation.responder import Responder
from trainspec.plans.accelerators import Devices
from trainspec.runs.processes import Processes
from trainspec.runs.run import Run
from trainspec.step import Backend, S
from trainspec.tasks import Answer
from trainspec.text.store import Tokenizer, find_tokenizer


def evaluate(
    backend: Backend[S], run: Run, request: EvaluationRequest, *, processes: Processes, devices: Devices
) -> Evaluation | None:
    """Measure both models; the leader shows the table and writes the files. None where the loss alone is measured.

    Raises UserError for held-out records that cannot be read or have nothing to compare answers with, and for a damaged
    or missing checkpoint, all of them before anything takes long.
    """
    heldout = open_dataset(run, "heldout")
    if request.loss_only:
        state, whose = newest_state(
            backend,
            run,
            out=request.trained_in,
            processes=processes,
            tokenizer_digest=heldout.tokenizer_digest,
        )
        loss = heldout_loss(backend, state, heldout, heldout_examples(run))
        if processes.is_leader:
            print(f"held-out loss {loss:.6f} of {whose}")
        return None
    tokenizer = find_tokenizer(run.recipe.data, run.directory, run.recipe.model.from_)
    questions = _questions(run, heldout, tokenizer, request)
    responder = Responder(
        backend, run, tokenizer, request.settings, questions.stops if questions else frozenset()
    )
    asked = questions.asked if questions else ()
    measurer = Measurer(responder, heldout, asked, processes.is_leader)
    saved = newest_checkpoint(request.trained_in, processes)
    if saved:
        verify_together(saved, processes)
    if processes.is_leader:
        print(_measured(saved, len(asked)), flush=True)
    state = backend.init_state(run)
    untrained, trained = measurer.measure(state, STARTING), None
    if saved:
        state, whose = restored(
            backend, run, state, saved, processes=processes, tokenizer_digest=heldout.tokenizer_digest
        )
        trained = measurer.measure(state, whose)
    found = Evaluation(run, request, devices, heldout, questions, untrained, trained)
    if processes.is_leader:
        print("\n".join(table(found)), flush=True)
        print(f"wrote {', '.join(map(str, files.write(found)))}")
    return found


def _measured(saved: Path | None, asked: int) -> str:
    """What is about to be measured: it takes its time."""
    what = f"the held-out loss and {asked} answers" if asked else "the held-out loss"
    whose = f"of {saved} beside the untrained model" if saved else "of the untrained model alone"
    return f"measuring {what} {whose}"


def _questions(
    run: Run, heldout: Dataset, tokenizer: Tokenizer, request: EvaluationRequest
) -> Questions | None:
    """What is asked, where answers are measured. Raises DataError where the libraries of metrics are missing."""
    task = task_of(run, heldout)
    if task is None:
        if given := request.answer_options():
            raise UserError(
                f"{given[0]}: has no effect: {run.recipe.data.heldout} has no instruction record and no prompt with a completion as texts of a "
                "task with metrics, so that none is answered; leave it out"
            )
        return None
    way_out = "measure the loss alone with --loss-only"
    questions = questions_of(
        run, tokenizer, way_out=way_out, examples=request.examples, stop=request.settings.stop
    )
    task.score([Answer("", questions.asked[0].references)], language=run.recipe.data.language)
    return questions
