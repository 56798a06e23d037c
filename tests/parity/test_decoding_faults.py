"""Every fault of generation is caught at its token, in its side, and the closer looks say what is to blame."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
from many import run_many
from small import ROOT
from test_faults import changed_by, source_of, undefined

from parity.comparison.generations import Difference, GenerationComparison, ResponseComparison
from parity.faults import FAULTS as OF_TRAINING
from parity.faults.decoding import FAULTS, SETUPS, DecodingFault
from parity.faults.run import BACKENDS
from parity.faults.run_decoding import (
    PAGE_HEAD,
    DecodingOutcome,
    chosen_decoding,
    decoding_lines,
    decoding_page,
    decoding_summary,
    run_decoding_faults,
    stage_of,
)
from parity.runs.edit import Edit
from trainspec.errors import UserError
from trainspec.plans.names import Backend

# No mistake: it must come out as missed.
HARMLESS = replace(
    chosen_decoding(["stop-token-not-stopped-at"])[0],
    name="harmless",
    edits={
        "jax": (Edit("trainspec.generation.choice:uniform", "64 - _BITS", "65 - _BITS - 1"),),
        "torch": (Edit("trainspec.generation.choice:uniform", "64 - _BITS", "65 - _BITS - 1"),),
    },
)
NO_RUN = replace(
    HARMLESS,
    name="no-run",
    edits={"jax": (Edit("trainspec.generation.choice", "_BITS = 53", "_BITS = 1 / 0"),)},
)
# A real mistake, said to show elsewhere.
ELSEWHERE = replace(chosen_decoding(["temperature-applied-twice"])[0], name="elsewhere", stage="first token")
RESPONSE = ResponseComparison(0, 3, (3, 3), None, ())


def test_the_page_in_docs_is_of_these_faults():
    """`parity faults --of generation --page docs/faults-of-generation.md` writes it; faults added since are missing."""
    text = (ROOT / "docs/faults-of-generation.md").read_text(encoding="utf-8")
    caught = re.findall(r"^\| (\S+) \| (jax|torch) \| caught \|", text, re.MULTILINE)
    assert sorted(caught) == sorted((fault.name, b) for fault in FAULTS for b in fault.edits)
    assert text.startswith(PAGE_HEAD)
    assert " 0 not as expected." in text


def test_the_registry_is_whole():
    names = [fault.name for fault in (*OF_TRAINING, *FAULTS)]
    assert len(names) == len(set(names))
    for fault in FAULTS:
        assert fault.imitates
        assert fault.source
        assert fault.setup in SETUPS
        assert set(fault.edits) == set(BACKENDS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_edit_fits_the_source(fault: DecodingFault, backend: Backend):
    for module in {edit.module for edit in fault.edits[backend]}:
        assert module.startswith(("trainspec.", f"{backend}train."))
        changed = changed_by(fault.edits[backend], module)
        assert ast.unparse(changed) != ast.unparse(ast.parse(source_of(module)))
        compile(changed, module, "exec")


def test_what_is_put_in_names_what_is_there(tmp_path: Path):
    every = [(f"{f.name}-{backend}", edits) for f in FAULTS for backend, edits in f.edits.items()]
    assert undefined(tmp_path, every) == "All checks passed!\n"


def outcome(fault: DecodingFault | None, *differences: Difference, **agrees: bool) -> DecodingOutcome:
    responses = tuple(replace(RESPONSE, prompt=n, other=each) for n, each in enumerate(differences))
    comparison = GenerationComparison(responses or (RESPONSE,))
    looks = {"whole-rows": True, "alone": True} | {n.replace("_", "-"): v for n, v in agrees.items()}
    return DecodingOutcome(fault, "greedy", "torch", comparison, looks)


def second_token(*, side: str = "right", position: int = 1) -> Difference:
    return Difference(0, position, (side,), "score", "log-probability off")


def test_a_catch_is_one_at_the_right_token_in_the_right_side_with_the_right_looks():
    [fault] = chosen_decoding(["cache-position-off-by-one"])
    assert outcome(fault, second_token(), alone=False).word == "caught"
    wrong = {
        "another token": outcome(fault, second_token(position=2), alone=False),
        "another side": outcome(fault, second_token(side="left"), alone=False),
        "whole rows too": outcome(fault, second_token(), alone=False, whole_rows=False),
        "alone it agrees": outcome(fault, second_token()),
    }
    assert {name: each.word for name, each in wrong.items()} == dict.fromkeys(wrong, "MISPLACED")
    missed = outcome(fault, alone=False)
    assert missed.word == "MISSED"
    assert replace(missed, crash="no memory").word == "CRASHED"
    assert "expected: second token" in "\n".join(decoding_lines([missed]))
    clean = outcome(None)
    assert clean.word == "passes"
    assert outcome(None, second_token()).word == "FALSE ALARM"
    assert outcome(None, alone=False).word == "FALSE ALARM"
    assert (
        decoding_summary([clean, missed])
        == "0 caught at the right token, 1 clean pairs pass, 1 not as expected"
    )
    assert "| MISSED |" in decoding_page([clean, missed])


def test_stages():
    def stage(*differences: Difference) -> str:
        found = outcome(None, *differences).comparison
        assert found
        return stage_of(found)

    assert stage() == "nowhere"
    assert stage(second_token()) == "second token"
    assert stage(second_token(), second_token(position=0)) == "first token"
    assert stage(replace(second_token(), kind="choice")) == "draw"
    assert stage(replace(second_token(), kind="end", position=3)) == "end"
    assert stage(replace(second_token(), kind="text")) == "text"


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(UserError, match="did you mean 'adapter-not-applied'"):
        chosen_decoding(["adapter-not-aplied"])


def test_the_command_line(tmp_path: Path):
    listing, other, page = run_many(
        "parity",
        [
            ["faults", "--of", "generation", "--list"],
            ["faults", "--of", "generation", "--precision", "bf16"],
            ["faults", "--of", "generation", "--only", FAULTS[0].name, "--page", "p.md"],
        ],
        tmp_path,
    )
    assert listing["code"] == 0
    assert all(f"{fault.name}: " in listing["out"] for fault in FAULTS)
    assert (other["code"], page["code"]) == (2, 2)
    assert "leave --from and other precisions out" in other["err"]


@pytest.mark.full(minutes=12)
def test_every_fault_is_caught_at_its_token(tmp_path: Path):
    outcomes = run_decoding_faults((*FAULTS, HARMLESS, NO_RUN, ELSEWHERE), BACKENDS, tmp_path)
    words = {(o.name, o.backend): (o.word, o.said()) for o in outcomes}
    expected = {(o.name, o.backend): "caught" if o.fault else "passes" for o in outcomes}
    expected |= {
        (name, b): word
        for name, word in (("harmless", "MISSED"), ("elsewhere", "MISPLACED"))
        for b in BACKENDS
    }
    expected["no-run", "jax"] = "CRASHED"
    assert {key: word for key, (word, _) in words.items()} == expected, words
    assert len(expected) == len(SETUPS) + 2 * (len(FAULTS) + 2) + 1
