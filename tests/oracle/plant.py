"""Fill the cache of a recipe with a fault planted where records become tokens: `python -m oracle.plant FAULT RECIPE` in tests.

Without a fault (`-`) it fills it as the worker would. Prints the folder's name in the cache.
"""

import importlib
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from parity.faults.shared import SHARED
from parity.runs.plant import planted


def main() -> None:
    name, recipe = sys.argv[1:]
    edits = [fault.edit for fault in SHARED if fault.name == name]
    assert edits or name == "-", f"no fault {name}"
    with planted(edits) if edits else nullcontext():
        fill = importlib.import_module("trainspec.text.fill")
        store = importlib.import_module("trainspec.text.store")
        data, run = (importlib.import_module(f"trainspec.{name}") for name in ("data", "runs.run"))
        store.ask = lambda *, online=False, do, **job: fill.fill(job)  # in this process, where the edits are
        loaded = importlib.import_module("trainspec.recipe").load_recipe(Path(recipe))
        opened = data.open_dataset(run.resolve(loaded), "train")
        print(opened.digest)


if __name__ == "__main__":
    main()
