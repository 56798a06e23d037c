"""Edits of the syntax tree: what they match, what they refuse, and what they ignore."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from small import ROOT

from parity.runs.edit import Edit, PlantError, edited

SOURCE = '''"""A module."""

from __future__ import annotations

EPS = 1e-6


def mean(values: list[float], eps: float = EPS) -> float:
    """The mean."""
    total = sum(values)
    count = len(values)
    return total / (count + eps)


class Scaled:
    """Twice."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def of(self, x: float) -> float:
        def inner(y: float) -> float:
            return self.factor * y

        if x > 0:
            x = x + 1
        return inner(x)
'''


def made(*edits: tuple[str, str, str], source: str = SOURCE) -> str:
    return ast.unparse(edited(source, [Edit(*edit) for edit in edits]))


def expected(old: str, new: str) -> str:
    assert SOURCE.count(old) == 1
    return ast.unparse(ast.parse(SOURCE.replace(old, new)))


def test_an_expression_is_changed_where_a_definition_has_it():
    assert made(("m:mean", "__sum / __n", "__n / __sum")) == expected(
        "total / (count + eps)", "(count + eps) / total"
    )
    assert made(("m:Scaled.of.inner", "self.factor * __y", "__it + __y")) == expected(
        "self.factor * y", "self.factor * y + y"
    )
    assert made(("m:Scaled.of", "self.factor * __y", "__y")) == expected("self.factor * y", "y")
    assert made(("m", "EPS = __eps", "EPS = 0.0")) == expected("EPS = 1e-6", "EPS = 0.0")


def test_statements_become_others():
    run = "__total = sum(__values)\n__count = len(__values)"
    changed = expected(
        "    count = len(values)\n", "    count = len(values)\n    total, count = (count, total)\n"
    )
    assert made(("m:mean", run, "__it\n__total, __count = __count, __total")) == changed
    assert made(("m:mean", "return __mean", "print(__mean)\n__it")) == expected(
        "    return total", "    print(total / (count + eps))\n    return total"
    )
    assert made(("m:Scaled.of", "__x = __x + 1", "pass")) == expected("x = x + 1", "pass")


def test_nothing_is_the_beginning_of_a_definition():
    assert made(("m:mean", "", "values = values[:-1]")) == expected(
        "    total", "    values = values[:-1]\n    total"
    )
    assert made(("m", "", "import math")) == expected("EPS = 1e-6", "import math\nEPS = 1e-6")


@pytest.mark.parametrize(
    "formatted",
    [
        SOURCE.replace("total / (count + eps)", "(\n        total  # all\n        / ((count) + eps)\n    )"),
        SOURCE.replace("    count =", "\n\n    # how many there are\n    count ="),
        SOURCE.replace('"""The mean."""', "'''The mean.'''"),
    ],
)
def test_formatting_does_not_count(formatted: str):
    edit = ("m:mean", "__n = len(__values)\nreturn __sum / (__n + __eps)", "return __sum")
    assert formatted != SOURCE
    assert made(edit, source=formatted) == made(edit)


def test_quotes_do_not_count():
    assert made(("m", "x = f('b')", "pass"), source='x = f("b")') == "pass"


def test_renamed_variables_do_not_count():
    edit = ("m:mean", "return __sum / (__n + __eps)", "return __sum / __n")
    renamed = SOURCE.replace("total", "whole").replace("count", "number")
    assert made(edit, source=renamed) == made(edit).replace("total", "whole").replace("count", "number")


@pytest.mark.parametrize(
    ("at", "pattern", "times"),
    [
        ("m:mean", "__a - __b", 0),
        ("m:mean", "__values.sum()", 0),
        ("m:Scaled", "__self.factor", 1),  # read once, assigned to once
        ("m:mean", "__f(values)", 2),
        ("m:mean", "float", 0),  # annotations are not looked at
        ("m", "__a / __b", 0),  # it is in a function
        ("m:mean", "1", 0),
        ("m:Scaled.of", "1.0", 0),  # not 1
        ("m:Scaled.of", "True", 0),
        ("m:mean", "__n = len(__values)\n__total = sum(__values)", 0),  # the other order
    ],
)
def test_a_pattern_fits_exactly_once(at: str, pattern: str, times: int):
    if times == 1:
        return assert_changed(at, pattern)
    with pytest.raises(PlantError) as error:
        made((at, pattern, "None"))
    assert str(error.value) == f"{at}: {pattern!r} is there {times} times, not once"


def assert_changed(at: str, pattern: str) -> None:
    assert made((at, pattern, "None")) != ast.unparse(ast.parse(SOURCE))


@pytest.mark.parametrize("at", ["m:median", "m:Scaled.mean", "m:inner", "m:mean.values", "m:twice"])
def test_a_definition_that_is_not_there_once_is_an_error(at: str):
    twice = SOURCE + "\n\ndef twice(): return 1\n\n\ndef twice(): return 1\n"
    with pytest.raises(PlantError) as error:
        made((at, "__a / 1", "__a"), source=twice)
    assert str(error.value).startswith(f"{at}: {at.split(':')[1].split('.')[-1]!r} is defined there ")
    assert str(error.value).endswith("times, not once; for '__a / 1'")


def test_a_wildcard_is_the_same_everywhere():
    source = "def f(a, b):\n    a = g(a, b)\n    b = g(a, a[0], b)\n    return (a[0] + a[0]) * (a + b)\n"
    assert "b[0] * 2" not in made(("m:f", "__x + __x", "__x * 2"), source=source)
    assert "a[0] * 2 * (a + b)" in made(("m:f", "__x + __x", "__x * 2"), source=source)
    assert "a = h(b)" in made(("m:f", "__x = g(__x, __y)", "__x = h(__y)"), source=source)
    with pytest.raises(PlantError, match=r"'__x - 1' has no __y, which '__x - __y' names"):
        made(("m", "__x - 1", "__x - __y"), source="a - 1")


def test_what_was_read_can_be_assigned_to():
    swapped = ("m", "__a, __b = __x", "__b, __a = __x")
    compile(edited("(a.b, c), *d[0] = e", [Edit(*swapped)]), "m", "exec")
    assert made(swapped, source="(a.b, c), *d[0] = e") == "*d[0], (a.b, c) = e"


def test_what_is_no_python_is_an_error():
    with pytest.raises(PlantError, match="m: 'a b' is not Python"):
        made(("m", "a b", "c"))


def test_names_of_pythons_own_are_no_wildcards():
    assert made(("m", "__name__", "__it"), source="x = __name__\ny = __import__('z')") == (
        "x = __name__\ny = __import__('z')"
    )


def test_edits_are_made_one_after_the_other():
    twice = [("m:mean", "__sum / __n", "__sum - __n"), ("m:mean", "__sum - __n", "__sum * __n")]
    assert made(*twice) == expected("total / (count + eps)", "total * (count + eps)")


def test_a_traceback_has_the_line_of_what_was_changed():
    tree = edited(SOURCE, [Edit("m:mean", "return __mean", "x = 1\ny = x\nreturn y / 0")])
    names: dict = {}
    exec(compile(tree, "m.py", "exec"), names)
    with pytest.raises(ZeroDivisionError) as error:
        names["mean"]([1.0])
    frame = traceback.extract_tb(error.value.__traceback__)[-1]
    assert frame.lineno == SOURCE.splitlines().index("    return total / (count + eps)") + 1


def test_a_substitute_is_new_for_every_case(tmp_path: Path):
    """Each case is planted in the original source, whatever the previous one did."""
    program = tmp_path / "jaxtrain"
    program.mkdir()
    (program / "__init__.py").touch()
    (program / "cli.py").write_text(
        "from parity.faults.substitutes.text import encoded_apart\n"
        "class Encoder:\n"
        "    def _tokens(self, text, special): return [len(text)], [(0, len(text))]\n"
        "def main(argv): print(*encoded_apart(Encoder(), 'abcde', [(1, 3)])[0])\n"
    )
    found = Edit("parity.faults.substitutes.text:encoded_apart", "ids += __part", "ids += [-1]")
    edits = ([], [vars(found)], [], [vars(Edit("trainspec.rng", "", "pass"))])
    cases = [{"program": "jaxtrain", "argv": [], "edits": some} for some in edits]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "parity.runs.plant", "cases.json", "results.jsonl"]
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    ended = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [end["out"] for end in ended[:3]] == ["1 2 2\n", "-1 -1 -1\n", "1 2 2\n"]
    assert [end["code"] for end in ended] == [None, None, None, 70]
    assert "trainspec.rng was not loaded, so nothing was planted" in ended[3]["err"]


def test_one_process_tokenises_for_every_case_of_a_launch(tmp_path: Path):
    """Its errors are still those that the modules of a later case know."""
    program = tmp_path / "jaxtrain"
    program.mkdir()
    (program / "__init__.py").touch()
    (program / "cli.py").write_text(
        "from pathlib import Path\n"
        "from trainspec.errors import UserError\n"
        "from trainspec.text.process import ask\n"
        "def main(argv):\n"
        "    try: ask(do='identify', source='nowhere')\n"
        "    except UserError: print(Path('/proc/thread-self/children').read_text())\n"
    )
    cases = [{"program": "jaxtrain", "argv": [], "edits": []}] * 3
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "parity.runs.plant", "cases.json", "results.jsonl"]
    subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, check=True)
    ended = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {end["code"] for end in ended} == {None}, ended
    first = ended[0]["out"].split()
    assert len(first) == 1
    assert [end["out"].split() for end in ended] == [first] * 3
