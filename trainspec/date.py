"""The date that chat templates get as today's, so that a run does not depend on the day."""

from __future__ import annotations

import datetime

DATE = datetime.date(2024, 7, 26)
