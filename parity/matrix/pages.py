"""The pages that `parity matrix` writes. Light: a command line names them before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

STATUS_PAGE, FAMILIES_PAGE = Path("docs/parity-status.md"), Path("docs/parity-status-families.md")
