"""Every cause that a diagnosis can name, grouped by subject: one registry by name."""

from parity.diagnosis.cause import Cause
from parity.diagnosis.causes import (
    attention,
    checkpoint,
    data,
    layers,
    loss,
    methods,
    optimizer,
    precision,
    rotation,
    sharding,
)

CAUSES: dict[str, Cause] = {
    cause.name: cause
    for module in (
        checkpoint,
        data,
        rotation,
        attention,
        layers,
        methods,
        loss,
        sharding,
        precision,
        optimizer,
    )
    for cause in module.CAUSES
}
