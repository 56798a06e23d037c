"""What asks a run to stop: a note once there is something to save, an error before, and at once if it is asked again."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace

import pytest
from small import ROOT

from trainspec.command import backend_parser, run_command
from trainspec.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_MACHINE,
    EXIT_STOPPED,
    MachineError,
    StoppedError,
    WeightsError,
)
from trainspec.failures import outcome
from trainspec.runs.agreement import Agreement
from trainspec.runs.processes import Processes
from trainspec.runs.stops import StopRequest, listening

BOTH = [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")]


@pytest.fixture(autouse=True)
def python_s_own_handlers():
    """A test that a shell has in its background would ignore interruptions."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "word"), BOTH)
def test_a_request_is_noted_where_it_is_deferred_and_an_error_before(number, word):
    with listening() as stop:
        with pytest.raises(StoppedError, match=f"^stopped by {word} before its first update$"):
            signal.raise_signal(number)
        assert stop.asked == word
    with listening() as stop:
        stop.defer()
        assert stop.asked is None
        signal.raise_signal(number)
        assert (stop.asked, stop.signal) == (word, number)


@pytest.mark.parametrize(("number", "word"), BOTH)
def test_a_request_that_is_held_back_is_an_error_afterwards(number, word):
    with listening() as stop:
        held = stop.held_back()
        held.__enter__()
        signal.raise_signal(number)  # and on it goes
        with pytest.raises(StoppedError, match=f"^stopped by {word} before"):
            held.__exit__(None, None, None)
    with listening() as stop:
        with stop.held_back():
            pass
        with pytest.raises(StoppedError):  # nothing is held back any more
            signal.raise_signal(number)


def test_a_ctrl_c_after_any_request_stops_at_once_and_a_repeated_sigterm_does_not():
    for first, word in BOTH:
        with listening() as stop:
            stop.defer()
            signal.raise_signal(first)
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            assert stop.asked == word  # the first one


def test_handlers_are_put_back_after_an_error_too():
    before = {number: signal.getsignal(number) for number, _ in BOTH}
    inside = {}

    def fails() -> None:
        with listening():
            inside.update({number: signal.getsignal(number) for number, _ in BOTH})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert all(inside[number] != handler for number, handler in before.items())
    assert {number: signal.getsignal(number) for number, _ in BOTH} == before


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with listening() as stop:
        stop.defer()
        signal.raise_signal(signal.SIGINT)
        assert stop.asked is None
        signal.raise_signal(signal.SIGTERM)  # control
        assert stop.asked == "SIGTERM"


def test_a_thread_hears_nothing_and_changes_nothing():
    before = signal.getsignal(signal.SIGTERM)
    found: list[object] = []

    def work() -> None:
        with listening() as stop:
            found.extend((stop.asked, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None, before]


def test_the_code_and_the_line_of_a_stopped_run():
    assert outcome(StoppedError("SIGTERM", 7)) == (EXIT_STOPPED, "stopped by SIGTERM after step 7")
    assert outcome(StoppedError("Ctrl-C", 0)) == (75, "stopped by Ctrl-C before its first update")


def agreed(*stops: StopRequest, fails: int | None = None, calls: int = 1) -> list[list[object]]:
    """What `go_on` does in as many processes, here threads that meet, `calls` times: `is_due`, or the error."""
    count = len(stops)
    meeting, texts = threading.Barrier(count, timeout=30), [""] * count
    results: list[list[object]] = [[] for _ in stops]
    hour = iter(range(0, 10**6, 3600))

    def exchange(index: int, text: str) -> list[str]:
        texts[index] = text
        meeting.wait()
        found = list(texts)
        meeting.wait()
        return found

    def process(index: int) -> None:
        here = Processes(index, count, lambda text: exchange(index, text))

        def check() -> None:
            if index == fails:
                raise OSError(28, "No space left on device", "a/b")

        # Only the leader's clock counts: that of the others would be due at once.
        now = (lambda: float(next(hour)) / 60) if index == 0 else (lambda: 1e9 if results[index] else 0.0)
        failure = (lambda: "no space") if index == fails else (lambda: None)
        agreement = Agreement(here, stops[index], failure=failure, check=check, minutes=2, now=now)
        for step in range(1, calls + 1):
            try:
                agreement.go_on(step)
                results[index].append(agreement.is_due)
            except (Exception, StoppedError) as error:
                results[index].append(f"{type(error).__name__}: {error}")
                return

    threads = [threading.Thread(target=process, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def asked(number: int | None) -> StopRequest:
    stop = StopRequest()
    stop.defer()
    if number is not None:
        stop.hear(number)
    return stop


@pytest.mark.parametrize("who", [0, 1, 2])
def test_all_stop_where_one_is_asked(who: int):
    stops = [asked(signal.SIGTERM if index == who else None) for index in range(3)]
    assert agreed(*stops) == [["StoppedError: stopped by SIGTERM after step 1"]] * 3
    assert agreed(*[asked(None)] * 3) == [[False]] * 3  # control


def test_all_end_where_one_cannot_save_and_each_says_whose_fault_it_is():
    first, second = agreed(asked(None), asked(None), fails=1)
    assert first == ["MachineError: process 1 of 2 could not save its part of a checkpoint: no space"]
    assert second == ["OSError: [Errno 28] No space left on device: 'a/b'"]


def test_work_that_ends_a_run_is_done_when_all_have_done_it():
    meeting, done = threading.Barrier(2, timeout=30), []
    results: dict[int, str] = {}

    def exchange(index: int, text: str, texts: list[str] = ["", ""]) -> list[str]:  # noqa: B006
        texts[index] = text
        meeting.wait()
        found = list(texts)
        meeting.wait()
        return found

    def process(index: int, *, fails: bool) -> None:
        def work() -> None:
            time.sleep(0.05 * index)
            done.append(index)
            if fails and index == 1:
                raise WeightsError("half a file")

        try:
            Agreement(Processes(index, 2, lambda text: exchange(index, text))).finish(work)
            results[index] = f"ended after {len(done)}"
        except Exception as error:
            results[index] = f"{type(error).__name__}: {error}"

    for fails, wanted in (
        (False, {0: "ended after 2", 1: "ended after 2"}),
        (True, {0: "MachineError: process 1 of 2 could not save its part of a checkpoint: half a file",
                1: "WeightsError: half a file"}),
    ):  # fmt: skip
        done.clear()
        threads = [threading.Thread(target=process, args=(n,), kwargs={"fails": fails}) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == wanted


def test_minutes_are_those_of_the_leader():
    # Its clock goes on by a minute at each look; a checkpoint was begun at none of them.
    assert agreed(asked(None), asked(None), calls=4) == [[False, True, True, True]] * 2


def test_minutes_count_from_the_last_checkpoint():
    clock = [0.0]
    agreement = Agreement(minutes=0.5, now=lambda: clock[0])
    found = []
    for second in range(0, 100, 10):
        clock[0] = float(second)
        agreement.go_on(1)
        found.append(agreement.is_due)
        if agreement.is_due:
            agreement.saved()
    assert [i for i, is_due in enumerate(found) if is_due] == [3, 6, 9]
    agreement = Agreement(now=lambda: 1e9)
    agreement.go_on(1)
    assert not agreement.is_due


def test_who_waits_looks_without_meeting_the_others():
    def never(text: str) -> list[str]:
        raise AssertionError(f"met with {text!r}")

    agreement = Agreement(Processes(0, 2, never), stop := asked(None))
    agreement.look(3)
    stop.hear(signal.SIGTERM)
    with pytest.raises(AssertionError, match=r"met with .*SIGTERM"):
        agreement.look(3)
    with pytest.raises(StoppedError, match="after step 3"):
        Agreement(stop=stop).look(3)


def test_an_error_of_a_save_is_raised_between_updates():
    def fails() -> None:
        raise MachineError("the disk")

    agreement = Agreement(failure=lambda: "the disk", check=fails)
    assert not agreement.is_stopping()  # asked in the middle of an evaluation
    with pytest.raises(MachineError, match="the disk"):
        agreement.go_on(1)


WAITS = """
import sys, time
from trainspec.runs.stops import listening
from trainspec.errors import StoppedError
with listening() as stop:
    stop.defer()
    print("listening", flush=True)
    while stop.asked is None:
        time.sleep(0.01)
    print(stop.asked, flush=True)
print("heard", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(("number", "word"), BOTH)
def test_a_real_signal_of_another_process_is_heard_and_afterwards_ends_the_program(number, word):
    with subprocess.Popen(
        [sys.executable, "-c", WAITS], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "listening\n"
        child.send_signal(number)
        assert [child.stdout.readline(), child.stdout.readline()] == [f"{word}\n", "heard\n"]
        time.sleep(0.05)
        child.send_signal(number)
    assert child.returncode == -number


def test_a_request_within_a_callback_that_drops_errors_is_noted_and_prints_nothing(capsys):
    """As in the one that JAX has the garbage collector call."""

    class Dropping:
        def __init__(self, error: bool) -> None:
            self.error = error

        def __del__(self) -> None:
            if self.error:
                raise ValueError("another error is still told")
            signal.raise_signal(signal.SIGTERM)

    hook = sys.unraisablehook
    sys.unraisablehook = sys.__unraisablehook__  # not pytest's
    try:
        with listening() as stop:
            Dropping(error=False)
            assert stop.asked == "SIGTERM"
            assert capsys.readouterr().err == ""
            Dropping(error=True)
        assert "another error is still told" in capsys.readouterr().err
    finally:
        sys.unraisablehook = hook


@pytest.mark.parametrize(("number", "word"), BOTH)
def test_a_request_while_a_run_is_loaded_is_one_line_and_what_is_saved_is_named(
    number, word, tmp_path, capsys
):
    """From the first line of `train` on, long before there is a loop that listens."""
    before, heard = signal.getsignal(number), []

    def ended(command: str, *, defers: bool = False) -> tuple[int, str]:
        def main(args: Namespace) -> None:
            heard.append(signal.getsignal(number) != before)
            if command == "train":
                if defers:
                    args.stopping.defer()
                signal.raise_signal(number)

        words = [command, "recipe.yaml", "--out", str(tmp_path)]
        return run_command(main, backend_parser("jaxtrain"), words), capsys.readouterr().err

    line = f"jaxtrain: stopped by {word} before its first update; "
    assert ended("train") == (EXIT_STOPPED, f"{line}nothing was saved yet\n")
    saved = tmp_path / "checkpoints/step-000004"
    saved.mkdir(parents=True)
    assert ended("train") == (EXIT_STOPPED, f"{line}saved: {saved}; continue with --resume\n")
    assert ended("train", defers=True) == (EXIT_DONE, "")  # it is the loop's to look at
    assert ended("eval") == (EXIT_DONE, "")
    assert heard == [True, True, True, False]
    assert signal.getsignal(number) == before


def test_a_request_after_the_run_ends_the_program_at_once_and_changes_no_exit_code(capsys):
    """When the loop no longer looks at requests, and processes are let go, which may wait for each other."""
    reached = []

    def ended(number: signal.Signals, error: Exception | None = None) -> int:
        def main(args: Namespace) -> None:
            try:
                with listening(args.stopping) as stop:
                    stop.defer()
                    if error:
                        raise error
            finally:
                signal.raise_signal(number)
                reached.append(number)

        try:
            return run_command(main, backend_parser("jaxtrain"), ["train", "recipe.yaml"])
        except SystemExit as end:
            return int(end.code or 0)

    assert ended(signal.SIGTERM) == EXIT_DONE
    assert ended(signal.SIGINT) == EXIT_INTERRUPTED
    capsys.readouterr()
    assert ended(signal.SIGTERM, MachineError("the disk")) == EXIT_MACHINE
    assert capsys.readouterr().err == "jaxtrain: the disk\n"
    assert not reached


@pytest.mark.parametrize(
    ("words", "code"), [("None", EXIT_MACHINE), ("['train', 'r.yaml']", -signal.SIGTERM)]
)
def test_a_sigterm_while_the_interpreter_ends_changes_no_exit_code(words: str, code: int):
    """The program's own command line; control: a command that another program runs in its process leaves signals as they were."""
    program = (
        "import atexit, signal, sys; from trainspec.command import backend_parser, run_command; "
        "from trainspec.errors import MachineError; sys.argv[1:] = ['train', 'r.yaml']; "
        "atexit.register(signal.raise_signal, signal.SIGTERM); "
        "main = lambda args: (_ for _ in ()).throw(MachineError('the disk')); "
        f"sys.exit(run_command(main, backend_parser('jaxtrain'), {words}))"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (code, "jaxtrain: the disk\n")


def test_a_sigterm_that_schedulers_repeat_does_not_hurry_a_run_that_has_stopped_for_it():
    def stopped(request: StopRequest) -> None:
        with listening(request):
            request.defer()
            signal.raise_signal(signal.SIGTERM)
            raise StoppedError("SIGTERM", 3)

    with listening() as stop:
        with pytest.raises(StoppedError):
            stopped(stop)
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked == "SIGTERM"
