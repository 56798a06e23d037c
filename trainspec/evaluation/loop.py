"""The command `eval`: the model that a run starts from and its newest checkpoint, measured on the held-out records."""

from __future__ import annotations

from trainspec.data import open_dataset
from trainspec.evaluation import files
from trainspec.evaluation.evaluation import Evaluation, task_of
from trainspec.evaluation.heldout import Questions, questions_of
from trainspec.evaluation.measurement import Measurer
from trainspec.evaluation.request import EvaluationRequest
from trainspec.evaluation.table import table
from trainspec.generation.responder import Responder
from trainspec.plans.accelerators import Devices
from trainspec.runs.contract import Backend, S
from trainspec.runs.newest import newest_checkpoint, newest_state, restored
from trainspec.runs.observers import heldout_examples, heldout_loss
from trainspec.runs.processes import Processes
from trainspec.runs.run import Run
from trainspec.tasks import Answer
from trainspec.text.store import find_tokenizer


def evaluate(
    backend: Backend[S], run: Run, request: EvaluationRequest, *, processes: Processes, devices: Devices
) -> Evaluation | None:
    """Measure both models; the leader shows the table and writes the files. None where the loss alone is measured.

    Raises UserError for held-out records that cannot be read or have nothing to compare answers with.
    """
    heldout = open_dataset(run, "heldout")
    if request.loss_only:
        state, whose = newest_state(
            backend, run, out=request.out, processes=processes, tokenizer_digest=heldout.tokenizer_digest
        )
        loss = heldout_loss(backend, state, heldout, heldout_examples(run))
        if processes.is_leader:
            print(f"held-out loss {loss:.6f} of {whose}")
        return None
    tokenizer = find_tokenizer(run.recipe.data, run.directory, run.recipe.model.from_)
    questions = _questions(run, request)
    responder = Responder(
        backend, run, tokenizer, request.settings, questions.stops if questions else frozenset()
    )
    asked = questions.asked if questions else ()
    measurer = Measurer(responder, heldout, asked, processes.is_leader)
    state = backend.init_state(run)
    untrained, trained = measurer.measure(state, "the starting weights"), None
    if saved := newest_checkpoint(request.out, processes):
        state, whose = restored(
            backend, run, state, saved, processes=processes, tokenizer_digest=heldout.tokenizer_digest
        )
        trained = measurer.measure(state, whose)
    found = Evaluation(run, request, devices, heldout, questions, untrained, trained)
    if processes.is_leader:
        print("\n".join(table(found)), flush=True)
        print(f"wrote {', '.join(map(str, files.write(found)))}")
    return found


def _questions(run: Run, request: EvaluationRequest) -> Questions | None:
    """What is asked, where the run's task has metrics. Raises DataError where their libraries are missing, before anything takes long."""
    task = task_of(run)
    if task is None:
        return None
    tokenizer = find_tokenizer(run.recipe.data, run.directory, run.recipe.model.from_)
    questions = questions_of(run, tokenizer, examples=request.examples)
    task.score([Answer("", questions.asked[0].references)], language=run.recipe.data.language)
    return questions
