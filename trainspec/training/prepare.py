"""What is refused before a backend is loaded: all that a recipe, the names of its files and the options say.

Loading a framework takes many times as long, and a run on several devices starts as many processes.
"""

from __future__ import annotations

from pathlib import Path

from trainspec.checkpoints.checkpoint import check_readable, resumable_checkpoint
from trainspec.checkpoints.folders import put_back
from trainspec.checkpoints.newest import check_there
from trainspec.data import check_data
from trainspec.plans.capabilities import Capabilities
from trainspec.recipe import Recipe
from trainspec.runs.run import Run, resolve_on
from trainspec.text.prompt_file import read_prompt
from trainspec.text.store import find_tokenizer
from trainspec.trace import check_free
from trainspec.training.request import TrainRequest


def prepare(recipe: Recipe, backend: Capabilities, request: TrainRequest) -> Run:
    """The run of a recipe. Raises UserError for what can be known to be wrong with it or with the request."""
    run = resolve_on(recipe, backend)
    check_data(run, "train")
    if recipe.data.heldout:
        check_data(run, "heldout")
    check_readable(check_output(request), backend.name)
    return run


def prepare_evaluation(recipe: Recipe, backend: Capabilities, *, out: Path | None) -> Run:
    """The run of a recipe that is measured on `data.heldout` and reads no other records. Raises UserError.

    `out` is where its newest checkpoint must be; None: the starting weights alone are measured.
    """
    run = resolve_on(recipe, backend)
    check_data(run, "heldout")
    check_readable(check_there(out), backend.name)
    return run


def prepare_generation(recipe: Recipe, backend: Capabilities, *, out: Path | None) -> Run:
    """The run of a recipe whose model is to generate: the newest checkpoint in `out`, or None's starting weights. Raises UserError."""
    run = resolve_on(recipe, backend)
    find_tokenizer(recipe.data, run.directory, recipe.model.from_).files()
    read_prompt(recipe.data)
    check_readable(check_there(out), backend.name)
    return run


def check_output(request: TrainRequest) -> Path | None:
    """The checkpoint that a run resumes from, if any. Raises UserError where it would overwrite something."""
    if request.resume:
        put_back(request.out)
    saved = resumable_checkpoint(request.out, resume=request.resume)
    if request.trace:
        check_free(request.trace.directory, resumes=request.resume)
    return saved
