"""What `jaxtrain.pipeline` says each stage does, as JSON.

    python tests/jaxtrain/read_timelines.py CASES.json OUT.json      CASES: [{"plan": {...}, "microbatches": ...}, ...]

OUT has for every case its stages: lists of [kind, microbatch, chunk], null where a stage is idle.
"""

import json
import sys
from dataclasses import astuple
from pathlib import Path

from jaxtrain.pipeline import timeline
from trainspec.plans.plan import Plan


def main() -> None:
    cases, out = map(Path, sys.argv[1:])
    found = []
    for case in json.loads(cases.read_text()):
        stages = timeline(Plan.model_validate(case["plan"]), case["microbatches"])
        found.append([[work and astuple(work) for work in stage] for stage in stages])
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
