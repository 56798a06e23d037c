"""Tokenizers and chat templates: of a wrong type, version or encoding, cut, without end, naming what is not there."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import yaml

from damage.case import CHATML, Case, Tree, Whole, linked
from damage.recipes import recipe_tree
from damage.values import damage_text, damage_values, json_text, written

TEMPLATES = (
    CHATML,
    "{{ bos_token }}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set rest = messages %}{%- endif %}{%- for m in rest %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) "
    "%}{{ raise_exception('turns') }}{%- endif %}{%- if m.role == 'user' %}{{ '[INST] ' + (system or '') + m.content + ' "
    "[/INST]' }}{%- else %}{{ ' ' + m.content.split('</think>')[-1] + eos_token }}{%- endif %}{%- endfor %}",
)  # fmt: skip
JINJA_WORDS = (
    "{{ x }}", "{{ x.y.z }}", "{{ 1 / 0 }}", "{% if %}", "{% endif %}", "{% for m in messages %}", "{% endfor %}", "{%", "}}", "{#",
    "{{ messages }}", "{{ messages | tojson }}", "{{ raise_exception('no') }}", "{{ raise_exception('x' * 9000) }}", "{{ strftime_now('%Y') }}",
    "{{ strftime_now(5) }}", "{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}", "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}", "{{ messages[0].update({'content': 5}) }}", "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{{ 'x' * 100000 }}", "{% for i in range(3000) %}yy{% endfor %}", "{{ range(10**9) }}", "{{ cycler }}", "{{ self }}",
    "{{ namespace() }}", "{% generation %}", "{% endgeneration %}", "{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}",
    "{% break %}", "{{ '\\ud800' }}", "{{ '%c' % 55296 }}", "{{ ('%c' % 56320) ~ 'x' }}", "{{ '\\x00' }}", "{% raw %}", "{{ (((((((1" , "(" * 300, "{{" + "[" * 300 + "]" * 300 + "}}",
    "{% if 1 %}" * 120 + "{% endif %}" * 120, "{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "{{ 9 ** 9999 }}", "{{ 1 | int('x') }}",
    "{{ messages | map(attribute='content') | join }}", "{{ caller() }}", "{{ loop }}", "{{ m.content.foo() }}", "{{ 'a'.encode() }}",
    "{% set messages = 5 %}", "{% set m = none %}", "{{ none + 1 }}", "{% do x %}", "{% call f() %}", "{% trans %}", "{% autoescape true %}",
)  # fmt: skip
TOKENIZER_KEYS = (
    "bos_token", "eos_token", "pad_token", "unk_token", "additional_special_tokens", "extra_special_tokens", "chat_template",
    "added_tokens_decoder", "add_bos_token", "add_eos_token", "add_prefix_space", "tokenizer_class", "model_max_length", "auto_map",
    "legacy", "padding_side", "truncation_side", "clean_up_tokenization_spaces", "split_special_tokens", "model_input_names",
    "use_default_system_prompt", "processor_class", "backend", "cls_token", "tokenizer_file", "vocab_file", "added_tokens_file",
    "is_local", "local_files_only", "model_type", "errors", "name_or_path", "special_tokens_map_file", "init_inputs", "fix_mistral_regex",
)  # fmt: skip
SPOKEN = (
    {"messages": [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "A pear."}]},
    {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hé  <s> 7"},
                  {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA 🙂"}, {"role": "user", "content": "And?"},
                  {"role": "assistant", "content": "def f(x):\n    return x"}]},
)  # fmt: skip
WRITTEN = (
    {"prompt": "Name  a fruit.</s> <pad>", "completion": " A pear, é🙂.\n\tThat's it "},
    {"prompt": "", "completion": "x"},
)


def damage_tokenizer(folder: Path, rng: random.Random, whole: Whole) -> Case:
    """The JSON files of a tokenizer: of a wrong type, version or encoding, cut, or naming what is not there."""
    home = linked(whole.chat, folder / "tokenizer")
    config = json.loads((whole.chat / "tokenizer_config.json").read_text())
    if rng.random() < 0.3:
        (home / "config.json").symlink_to(whole.model / "config.json")
    if rng.random() < 0.5:
        config["added_tokens_decoder"] = {"320": _added("<|end|>"), "2": _added("</s>")}
    for _ in range(rng.choice((1, 1, 2))):
        kind = rng.choice(
            ("tokenizer_config", "tokenizer_config", "special_tokens_map", "added_tokens", "tokenizer")
        )
        tree: Tree = {
            "tokenizer_config": config,
            "special_tokens_map": {"bos_token": "<s>", "eos_token": _added("</s>"), "pad_token": "<pad>"},
            "added_tokens": {"<|end|>": 320, "<|user|>": 321},
            "tokenizer": json.loads((whole.chat / "tokenizer.json").read_text()),
        }[kind]
        if kind == "tokenizer" and rng.random() < 0.7:  # most of it is the vocabulary
            tree = _damage_head(tree, rng)
        else:
            tree = damage_values(tree, rng, keys=TOKENIZER_KEYS)
        text = json_text(tree, rng)
        if rng.random() < 0.1:
            text = text.replace('"1.0"', rng.choice(('"2.0"', '"1.0.0"', "1.0")), 1)
        (home / f"{kind}.json").unlink(missing_ok=True)
        (home / f"{kind}.json").write_bytes(written(text, rng, bytes_too=0.1))
    records = folder / "d.jsonl"
    _write_records(records, [*SPOKEN, *WRITTEN])
    return Case(_for_tokenizer(folder, rng, whole, home, records), tokenizer=home, records=records)


def _added(content: str) -> Tree:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, "__type": "AddedToken"} | flags


def _damage_head(tree: Tree, rng: random.Random) -> Tree:
    """All but the vocabulary and its merges, which are put back where there is still a place for them."""
    model = dict(tree["model"])
    large = {key: model.pop(key) for key in ("vocab", "merges")}
    damaged = damage_values(
        tree | {"model": model}, rng, keys=("truncation", "padding", "normalizer", "version")
    )
    if isinstance(damaged.get("model"), dict):
        damaged["model"] |= large
    return damaged


def _write_records(file: Path, records: Any) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _for_tokenizer(
    folder: Path, rng: random.Random, whole: Whole, home: Path, records: Path, **data: Any
) -> list[str]:
    tree = recipe_tree(whole, rng, train=str(records), tokenizer=str(home), too_long="cut", **data)
    (folder / "r.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return ["data", str(folder / "r.yaml")]


def damage_template(folder: Path, rng: random.Random, whole: Whole) -> Case:
    """A chat template in any of its places: no jinja, no text, without end, or reaching out of its sandbox."""
    text = rng.choice(TEMPLATES)
    if rng.random() < 0.5:
        cuts = [m.end() for m in re.finditer(r"[%}]}", text)]
        for _ in range(rng.choice((1, 1, 2))):
            at = rng.choice([0, len(text), *cuts])
            text = text[:at] + rng.choice(JINJA_WORDS) + text[at:]
    else:
        text = damage_text(text, rng, JINJA_WORDS)
    content = written(text, rng)
    home = linked(whole.model, folder / "tokenizer", "config.json", "tokenizer_config.json")
    config: Tree = json.loads((whole.model / "tokenizer_config.json").read_text())
    place = rng.randrange(6)
    file = (home if place == 0 else folder) / "chat_template.jinja"
    if place < 3:
        file.write_bytes(content)
    elif place == 3:
        (home / "additional_chat_templates").mkdir()
        (home / "additional_chat_templates/tool_use.jinja").write_bytes(content)
        (home / "chat_template.jinja").write_text(TEMPLATES[0], encoding="utf-8")
    else:
        text = content.decode("utf-8", rng.choice(("replace", "surrogateescape")))
        named = [{"name": "default", "template": text}, {"name": "tool_use", "template": TEMPLATES[1]}]
        config["chat_template"] = rng.choice(
            (text, text, named, {"default": text}, damage_values(named, rng))
        )
    (home / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    records = folder / "d.jsonl"
    _write_records(records, SPOKEN)
    template = {"chat_template": str(file)} if place in (1, 2) else {}
    argv = _for_tokenizer(folder, rng, whole, home, records, **template)
    return Case(argv, tokenizer=home, records=records, template=file if template else None)
