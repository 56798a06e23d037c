"""Exchange texts between processes.

    python tests/jaxtrain/run_exchange.py CASES.json OUT.json      CASES: {"texts": {NAME: [the text of each process]}}

OUT has the process's index, how many there are, and by name the texts that it was given.
"""

import json
import sys
from pathlib import Path

from run_plans import recipe_of

from jaxtrain import cluster


def main() -> None:
    cases, out = map(Path, sys.argv[1:])
    scratch = out.with_suffix("")
    scratch.mkdir()
    cluster.start(recipe_of(scratch, "plain", {"plan": {"data": 8}, "batch": {"global_examples": 8}}))
    processes = cluster.processes()
    texts = json.loads(cases.read_text())["texts"]
    found = {name: processes.exchange(of_each[processes.index]) for name, of_each in texts.items()}
    out.write_text(json.dumps({"index": processes.index, "count": processes.count, "texts": found}))


if __name__ == "__main__":
    main()
