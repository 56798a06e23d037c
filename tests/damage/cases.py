"""All kinds of damaged input. A case is its kind and its number, so one that fails can be made again by itself."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from damage.case import Case, Whole
from damage.models import damage_adapter, damage_config, damage_weights
from damage.recipes import damage_override, damage_recipe
from damage.records import damage_records, damage_table
from damage.tokenizers import damage_template, damage_tokenizer

Damage = Callable[[Path, random.Random, Whole], Case]
# Of each kind the function, and how many cases there are in all; their sum is 5,000.
DAMAGE: dict[str, tuple[Damage, int]] = {
    "recipe": (damage_recipe, 1000),
    "override": (damage_override, 600),
    "config": (damage_config, 700),
    "weights": (damage_weights, 200),
    "adapter": (damage_adapter, 100),
    "tokenizer": (damage_tokenizer, 1100),
    "template": (damage_template, 600),
    "records": (damage_records, 640),
    "table": (damage_table, 60),
}


def make_case(kind: str, number: int, folder: Path, whole: Whole) -> Case:
    """Case `number` of a kind, in `folder`, which is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return DAMAGE[kind][0](folder, random.Random(f"{kind} {number}"), whole)
