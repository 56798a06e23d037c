"""Named faults that a check must catch, each at the right location: the negative controls of the proof."""

from parity.faults import families, forward, loss, methods, pipeline, precision, sharding, update, virtual
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
)

__all__ = ["FAULTS", "SHARED", "Fault", "SharedFault", "Where"]
