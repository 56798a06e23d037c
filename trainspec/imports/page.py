"""docs/migrate.md from the tables: `python -m trainspec.imports.page docs/migrate.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainspec.imports import TOOLS
from trainspec.imports.deepspeed import SETTINGS as DEEPSPEED
from trainspec.imports.deepspeed import SOURCE as DEEPSPEED_SOURCE
from trainspec.imports.peft import SETTINGS as PEFT
from trainspec.imports.peft import SOURCE as PEFT_SOURCE
from trainspec.imports.settings import UNSET, Idle, Only, Question, Setting, format_theirs
from trainspec.imports.trainer import TRAINER

INTRODUCTION = """\
# Moving a configuration here

```
trainspec import lora-8b.yml --devices 8 --examples 52000 --out recipe.yaml
trainspec import training_args.json adapter_config.json ds_config.json --devices 8 --out recipe.yaml
```

A configuration of Axolotl, LLaMA-Factory, TRL's SFTTrainer or Hugging Face's Trainer becomes a recipe. The tool is recognised by its
settings. A DeepSpeed JSON that the file names is looked for where it says, beside the file, and among the further files given; an
`adapter_config.json` beside the Trainer's arguments belongs to them.

Every setting is in the table that is printed, with one of these verdicts:

| verdict | means |
|---|---|
| translated | the recipe says it |
| by default | the file does not say it; the recipe says the tool's own default, as ours may be another |
| replaced | `--set KEY=VALUE`, a setting of ours, stands in its place |
| no effect | it changes nothing here, for the reason in the line |
| asked for | it depends on what is in no file; the option that answers it is in the line |
| refused | not to be had here, or unknown; the way out is in the line |

While anything is refused or asked for there is no recipe, and the exit code is 2. `--drop KEY` leaves one of their settings out, or all
inside it; `--their KEY=VALUE` gives one another value first, such as `--their optimizer=adamw_torch` for 8-bit moments. A note that
begins with `differs` names what the recipe says as well as it can; the last line of the table lists them.

What is always another: the order of the examples, random weights and dropout masks are ours, a function of `run.seed`. Records are read
as [data.md](data.md) says; prompts that a tool wraps around records have to be in the records, as `prompt` and `completion`. Each
epoch of the Trainer ends with an update of what is left, where here the next epoch fills it up: `--examples` gives the same number
of updates.

This page is made from the importer's tables, `trainspec/imports/`, by `python -m trainspec.imports.page docs/migrate.md`.
"""


def page() -> str:
    """The whole page."""
    beside = {setting.name for setting in (*DEEPSPEED, *PEFT)}
    parts = [INTRODUCTION]
    for tool in TOOLS:
        inherited = () if tool is TRAINER else TRAINER.settings
        own = [
            s for s in tool.settings if s.name not in beside and not any(s is other for other in inherited)
        ]
        more = (
            " The Trainer's settings, below, are read as well."
            if len(own) + len(beside) < len(tool.settings)
            else ""
        )
        parts.append(section(tool.name, f"{tool.source}.{more}", own))
    parts.append(section("PEFT's adapter_config.json", f"{PEFT_SOURCE}.", PEFT))
    parts.append(section("DeepSpeed's JSON", f"{DEEPSPEED_SOURCE}.", DEEPSPEED))
    return "\n".join(parts)


def section(name: str, source: str, settings: Sequence[Setting]) -> str:
    """The settings of a tool: a table of those that are read, and lists of those without effect and of those refused."""
    read = [setting for setting in settings if not isinstance(setting.rule, Idle | Only)]
    lines = [f"## {name}", f"\nDefaults: {source}", "\n| setting | default there | here |", "|---|---|---|"]
    lines += [f"| `{setting.name}` | {default(setting)} | {setting.rule.page} |" for setting in read]
    lines += ["\nWithout effect here:\n", *grouped(settings, Idle)]
    lines += ["\nRefused unless off, or as said:\n", *grouped(settings, Only)]
    return "\n".join(lines) + "\n"


def default(setting: Setting) -> str:
    """The tool's default, where the recipe says it."""
    if setting.default is UNSET:
        return ""
    if isinstance(setting.default, Question):
        return "asked for"
    value = "none" if setting.default is None else f"`{format_theirs(setting.default)}`"
    return f"{value} ({setting.source})" if setting.source else value


def grouped(settings: Sequence[Setting], kind: type[Idle] | type[Only]) -> Iterator[str]:
    """Settings of one kind of rule, those of one reason on a line."""
    groups: dict[str, list[str]] = {}
    for setting in settings:
        if isinstance(setting.rule, kind):
            reason = setting.rule.reason if isinstance(setting.rule, Idle) else setting.rule.page
            groups.setdefault(reason, []).append(f"`{setting.name}`")
    yield from (f"- {reason}: {', '.join(names)}" for reason, names in groups.items())


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
