"""The command `generate`: prompts in, `generations.jsonl` out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TextIO

from trainspec.checkpoints.newest import newest_state
from trainspec.errors import DataError, Note
from trainspec.files.hf import end_tokens
from trainspec.generation.generation import Generation, Prompt
from trainspec.generation.request import GenerationRequest
from trainspec.generation.responder import Responder
from trainspec.generation.rows import check_vocabulary, room
from trainspec.runs.processes import Processes
from trainspec.runs.run import Run
from trainspec.step import Backend, S
from trainspec.text.store import find_tokenizer

FILE = "generations.jsonl"


def generate(
    backend: Backend[S], run: Run, request: GenerationRequest, processes: Processes
) -> list[Generation]:
    """Generate for every prompt, in their order; the leader writes `generations.jsonl` and says what was generated.

    Raises UserError for a prompt that cannot be read, is empty, or leaves no room in the model, and where there is no checkpoint
    to answer.
    """
    data = run.recipe.data
    tokenizer = find_tokenizer(data, run.directory, run.recipe.model.from_)
    source = str(request.file) if request.file else None
    asked = tokenizer.prompts(request.texts, source, data, stop=request.settings.stop)
    prompts = [Prompt(p["prompt"], tuple(p["ids"]), p["reference"]) for p in asked["prompts"]]
    check_prompts(prompts, run, source=source)
    stops = frozenset(asked["stops"]) | end_tokens(run.directory)
    state, whose = newest_state(
        backend, run, out=request.trained_in, processes=processes, tokenizer_digest=tokenizer.digest
    )
    say = _print if processes.is_leader else _ignore
    say(f"generating with {whose}\n")
    responder = Responder(backend, run, tokenizer, request.settings, stops)
    made: list[Generation] = []
    with _file(request.out / FILE) if processes.is_leader else nullcontext() as file:
        try:
            for done in responder.respond(state, prompts, say=say if request.streams else None):
                made += done
                if file is not None:  # what is done stays, whatever ends the rest
                    file.write("".join(generation.line() + "\n" for generation in done))
                    file.flush()
                if len(prompts) > request.settings.batch:
                    say(f"{len(made)} of {len(prompts)} responses\n")
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(
                Note(f"{request.out / FILE} has the first {len(made)} of {len(prompts)} responses")
            )
            raise
    stopped = sum(g.finish == "stop" for g in made)
    end = "\n" if request.streams else ""
    responses = f"{len(made)} response{'s' * (len(made) != 1)}"
    say(f"{end}wrote {request.out / FILE}: {responses}, {stopped} ended by themselves\n")
    return made


def check_prompts(prompts: Sequence[Prompt], run: Run, *, source: str | None = None) -> None:
    """Raises DataError for a prompt that leaves no room for a response, or has a token that the model has not.

    `source`: the file that they are the records of, in its order.
    """
    limit, of = room(run), f" of {source}" if source else ""
    for number, prompt in enumerate(prompts, 1):
        if len(prompt.ids) >= limit:
            raise DataError(
                f"prompt {number}{of} has {len(prompt.ids)} tokens: {run.spec.name} has positions for {limit}, and the response "
                "needs at least one; shorten it"
            )
        check_vocabulary(prompt.ids, run, f"prompt {number}{of}")


def _file(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w", encoding="utf-8")


def _print(text: str) -> None:
    print(text, end="", flush=True)


def _ignore(text: str) -> None:
    pass
