"""Named faults that a check must catch, each at the right location: the negative controls of the proof."""

from parity.faults import (
    adapting,
    attending,
    counting,
    families,
    forward,
    kernels,
    loss,
    methods,
    pipeline,
    precision,
    ranks,
    resumed,
    rules,
    sharding,
    starts,
    stream,
    update,
    virtual,
)
from parity.faults.fault import Fault, Where
from parity.faults.shared import SHARED, SharedFault

FAULTS: tuple[Fault, ...] = (
    *forward.FAULTS,
    *loss.FAULTS,
    *update.FAULTS,
    *methods.FAULTS,
    *virtual.FAULTS,
    *precision.FAULTS,
    *sharding.FAULTS,
    *pipeline.FAULTS,
    *families.FAULTS,
    *attending.FAULTS,
    *kernels.FAULTS,
    *stream.FAULTS,
    *starts.FAULTS,
    *counting.FAULTS,
    *adapting.FAULTS,
    *rules.FAULTS,
    *ranks.FAULTS,
    *resumed.FAULTS,
)

__all__ = ["FAULTS", "SHARED", "Fault", "SharedFault", "Where"]
