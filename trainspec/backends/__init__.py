"""The backends: each declares in a file of its own, as `BACKEND`, what it can do. A new backend adds a file.

Declared here and not in the backend's package, which nobody may import who has not its framework: `trainspec show` and
parity read all of them (docs/decisions/0019).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules

from trainspec.plans.capabilities import Capabilities
from trainspec.plans.plan import Backend


def _declared() -> dict[Backend, Capabilities]:
    found = (import_module(f"{__name__}.{file.name}").BACKEND for file in iter_modules(__path__))
    return {backend.name: backend for backend in found}


# By name, in the order of the files' names.
BACKENDS: Mapping[Backend, Capabilities] = _declared()
