"""The backends: each declares its capabilities in a file of its own, as `BACKEND`. A new backend adds a file.

They are here and not in the backend's package, which cannot be imported without its framework: `trainspec show` and
parity read all of them (docs/decisions/0019).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules

from trainspec.plans.capabilities import Capabilities
from trainspec.plans.plan import Backend


def _declared() -> dict[Backend, Capabilities]:
    declarations = (import_module(f"{__name__}.{file.name}").BACKEND for file in iter_modules(__path__))
    return {backend.name: backend for backend in declarations}


# By name, in the order of the file names.
BACKENDS: Mapping[Backend, Capabilities] = _declared()
