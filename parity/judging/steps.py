"""How many updates a check compares where the user does not say."""

from __future__ import annotations

DEFAULT_STEPS = 10
# Of a small twin.
SMALL_STEPS = 4
