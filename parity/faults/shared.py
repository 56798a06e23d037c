"""Faults in shared code: the same wrong tokens reach both backends, so parity passes and another judge must catch them.

That judge is transformers, in `tests/oracle`: `test_shared_faults.py` plants each of these where records become tokens,
has the judge catch it, and shows that `parity check` still passes. `docs/data.md` says which judge covers what.
"""

from __future__ import annotations

from dataclasses import dataclass

from parity.runs.edit import Edit

ENCODER = "trainspec.text.encode:Encoder"


@dataclass(frozen=True, kw_only=True)
class SharedFault:
    """A mistake in code that both backends use, and the conversation of `tests/oracle` on which transformers disagrees."""

    name: str
    imitates: str
    source: str
    edit: Edit
    conversation: str


SHARED = (
    SharedFault(
        name="blank-at-every-turn",
        imitates="each turn is encoded by itself, so a SentencePiece tokenizer puts a blank in front of every one",
        source="this project, at commit 332f762",
        edit=Edit(
            f"{ENCODER}.encode_chat",
            "__ids, __offsets = self._tokens(__text, special=False)",
            "from parity.faults.substitutes.text import encoded_apart\n"
            "__ids, __offsets = encoded_apart(self, __text, chosen)",
        ),
        conversation="many_turns",
    ),
    SharedFault(
        name="json-escaped",
        imitates="the template runs in jinja's own environment, whose tojson escapes markup and sorts keys",
        source="this project, at commit 332f762",
        edit=Edit(
            f"{ENCODER}._render",
            "",
            "from jinja2.utils import htmlsafe_json_dumps\n"
            "filters = chat_template_utils._compile_jinja_template(template).environment.filters\n"
            'filters["tojson"] = htmlsafe_json_dumps',
        ),
        conversation="tool_markup",
    ),
    SharedFault(
        name="end-token-not-trained",
        imitates="the mask stops before the token that ends the turn: the model never learns to stop",
        source="masks wrong by template: axolotl#2089, axolotl#3098, Automodel#3739",
        edit=Edit(
            f"{ENCODER}.encode_chat",
            "_mask(__offsets, __chosen)",
            "[counts and i not in self.ends for counts, i in zip(__it, ids)]",
        ),
        conversation="one_turn",
    ),
    SharedFault(
        name="prompt-trained",
        imitates="the loss is taken on the user's turns as well",
        source="masks wrong by template: huggingface/trl#4147, huggingface/trl#4201",
        edit=Edit(
            f"{ENCODER}.encode_chat", "_mask(__offsets, __chosen)", "_mask(__offsets, [(0, len(text))])"
        ),
        conversation="system",
    ),
    SharedFault(
        name="tools-dropped",
        imitates="the descriptions of the tools in a record never reach the template",
        source="this project, at commit 332f762",
        edit=Edit(f"{ENCODER}._render", "tools", "None"),
        conversation="tool_call",
    ),
)
