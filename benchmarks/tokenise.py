"""Tokenising a large file of chats: ours beside `datasets.map` with the same tokenizer and template, in turns.

    python benchmarks/tokenise.py [--megabytes 100] [--model build/demo-model] [--rounds 3]

Prints for each round megabytes of jsonl per second, and the largest memory that the processes of each side held together
(proportional set size). The peer makes ids alone; ours makes ids, what counts, and where turns begin.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

DATA = Path(__file__).parent.parent / "configs/data/chat-train.jsonl"


def main() -> None:
    """Write the file, time both sides in turns, print medians and their ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--model", type=Path, default=Path("build/demo-model"))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        file = write_chats(Path(scratch) / "chats.jsonl", arguments.megabytes * 10**6)
        megabytes = file.stat().st_size / 1e6
        sides: dict[str, Callable[[], object]] = {
            "twintrain": lambda: ours(file, arguments.model, Path(scratch) / "ours"),
            "datasets.map, 1 process": lambda: peer(file, arguments.model, Path(scratch) / "peer", 1),
            "datasets.map, 2 processes": lambda: peer(file, arguments.model, Path(scratch) / "peer", 2),
        }
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(arguments.rounds):
            for name, side in sides.items():
                seconds, peak = timed(side)
                rates[name].append(megabytes / seconds)
                print(
                    f"{name}: {megabytes:.0f} MB in {seconds:.1f} s, {megabytes / seconds:.2f} MB/s, peak {peak:.0f} MiB",
                    flush=True,
                )
        medians = {name: statistics.median(found) for name, found in rates.items()}
        for name, rate in medians.items():
            print(f"median {name}: {rate:.2f} MB/s, ours / it: {medians['twintrain'] / rate:.2f}")


def write_chats(file: Path, size: int) -> Path:
    """The shipped chats over and over, each with a number of its own, to `size` bytes."""
    chats = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    number = 0
    with file.open("w", encoding="utf-8") as out:
        while out.tell() < size:
            messages = [dict(message) for message in chats[number % len(chats)]["messages"]]
            messages[0]["content"] += f" ({number})"
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            number += 1
    return file


def ours(file: Path, model: Path, cache: Path) -> None:
    """As a run does it: the worker is started, and fills an empty cache."""
    from trainspec.recipe import Data
    from trainspec.text.store import find_tokenizer, tokenise

    shutil.rmtree(cache, ignore_errors=True)
    data = Data(train=str(file), cache=str(cache))
    tokenise(str(file), find_tokenizer(data, model, str(model)), data)


def peer(file: Path, model: Path, cache: Path, processes: int) -> None:
    """What a user would write with datasets and transformers."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    shutil.rmtree(cache, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
    rows.map(  # pyright: ignore[reportAttributeAccessIssue]
        lambda batch: tokenizer.apply_chat_template(batch["messages"], tokenize=True, return_dict=True),
        batched=True,
        num_proc=processes if processes > 1 else None,
        remove_columns=["messages"],
    )


def timed(side: Callable[[], object]) -> tuple[float, float]:
    """Seconds that a side takes in a process of its own, and the MiB that it and its children held at most."""
    process = multiprocessing.get_context("fork").Process(target=_leading, args=(side,))
    peak = [0.0]
    began = time.perf_counter()
    process.start()
    watch = threading.Thread(target=_watch, args=(process.pid, peak), daemon=True)
    watch.start()
    process.join()
    seconds = time.perf_counter() - began
    assert process.exitcode == 0
    watch.join()
    return seconds, peak[0]


def _leading(side: Callable[[], object]) -> None:
    os.setpgrp()
    side()


def _watch(leader: int | None, peak: list[float]) -> None:
    """The largest sum over the processes of a group, twice a second, until it is gone."""
    time.sleep(0.2)  # it makes its group first
    while total := sum(
        _memory(int(p.name))
        for p in Path("/proc").iterdir()
        if p.name.isdigit() and _group(int(p.name)) == leader
    ):
        peak[0] = max(peak[0], total / 2**20)
        time.sleep(0.5)


def _group(process: int) -> int | None:
    try:
        return os.getpgid(process)
    except ProcessLookupError:
        return None


def _memory(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except (OSError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    main()
