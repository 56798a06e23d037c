"""On PYTHONPATH: in those of several processes that PLANTED_IN names, PLANTED is run before the third update."""

import os

if (
    os.environ.get("RANK", os.environ.get("JAX_PROCESS_ID", "alone"))
    in os.environ.get("PLANTED_IN", "").split()
):
    from trainspec.data import Dataset

    whole = Dataset.batch

    def batch(self: Dataset, step: int, rows: int) -> object:
        if step == 2:
            exec(os.environ["PLANTED"])
        return whole(self, step, rows)

    Dataset.batch = batch  # type: ignore[method-assign]
