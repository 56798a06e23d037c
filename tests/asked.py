"""What the tests of this run ask of a module's fixtures, so that these train no more than is looked at."""

from __future__ import annotations

from typing import Any

import pytest


def asked_for(request: pytest.FixtureRequest, *names: str) -> list[Any]:
    """The values of the parameters `names` (tuples, if several) of the selected tests of the requesting module, in order."""
    specs = (getattr(item, "callspec", None) for item in request.session.items if item.path == request.path)
    found = (
        tuple(spec.params[n] for n in names) for spec in specs if spec and set(names) <= set(spec.params)
    )
    return [values if len(names) > 1 else values[0] for values in dict.fromkeys(found)]
