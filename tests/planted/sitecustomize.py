"""On PYTHONPATH: in those of several processes that PLANTED_IN names, PLANTED is run before the third update."""

import os

if (
    os.environ.get("RANK", os.environ.get("JAX_PROCESS_ID", "alone"))
    in os.environ.get("PLANTED_IN", "").split()
):
    from trainspec import schedule

    whole = schedule.learning_rate

    # The loop asks for the rate of every update just before it, in its own thread; batches are made ahead in another.
    def learning_rate(*args: object, step: int, **rest: object) -> float:
        if step == 2:
            exec(os.environ["PLANTED"])
        return whole(*args, step=step, **rest)  # type: ignore[arg-type]

    schedule.learning_rate = learning_rate  # type: ignore[assignment]
