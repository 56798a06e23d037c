"""Faults of what both backends share: the same wrong tokens reach both, so parity passes and another judge must see them.

That judge is transformers, in `tests/oracle`: `test_shared_faults.py` plants each of these where records become tokens, has
the judge catch it, and shows that `parity check` passes all the same. `docs/data.md` says which judge covers what.
"""

from __future__ import annotations

from dataclasses import dataclass

from parity.plant import Edit

ENCODE = "trainspec.text.encode"


@dataclass(frozen=True, kw_only=True)
class SharedFault:
    """A mistake in what both backends read, and the conversation of `tests/oracle` on which transformers disagrees."""

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
            ENCODE,
            "        ids, offsets = self._tokens(text, special=False)\n",
            "        ids, offsets = [], []\n"
            "        ends = sorted({0, len(text), *(end for span in chosen for end in span)})\n"
            "        for at, to in zip(ends, ends[1:]):\n"
            "            part, places = self._tokens(text[at:to], special=False)\n"
            "            ids, offsets = ids + part, offsets + [(at + a, at + b) for a, b in places]\n",
        ),
        conversation="many_turns",
    ),
    SharedFault(
        name="json-escaped",
        imitates="the template runs in jinja's own environment, whose tojson escapes markup and sorts keys",
        source="this project, at commit 332f762",
        edit=Edit(
            ENCODE,
            "        render: Any = render_jinja_template",
            "        filters = chat_template_utils._compile_jinja_template(template).environment.filters\n"
            '        filters["tojson"] = __import__("jinja2").utils.htmlsafe_json_dumps\n'
            "        render: Any = render_jinja_template",
        ),
        conversation="tool_markup",
    ),
    SharedFault(
        name="end-token-not-trained",
        imitates="the mask stops before the token that ends the turn: the model never learns to stop",
        source="masks wrong by template: axolotl#2089, axolotl#3098, Automodel#3739",
        edit=Edit(
            ENCODE,
            "        counts = _mask(offsets, chosen)\n",
            "        counts = [c and i not in self.ends for c, i in zip(_mask(offsets, chosen), ids)]\n",
        ),
        conversation="one_turn",
    ),
    SharedFault(
        name="prompt-trained",
        imitates="the loss is taken on the user's turns as well",
        source="masks wrong by template: huggingface/trl#4147, huggingface/trl#4201",
        edit=Edit(
            ENCODE,
            "        counts = _mask(offsets, chosen)\n",
            "        counts = _mask(offsets, [(0, len(text))])\n",
        ),
        conversation="system",
    ),
    SharedFault(
        name="tools-dropped",
        imitates="the descriptions of the tools in a record never reach the template",
        source="this project, at commit 332f762",
        edit=Edit(ENCODE, "                tools=tools,\n", "                tools=None,\n"),
        conversation="tool_call",
    ),
)
