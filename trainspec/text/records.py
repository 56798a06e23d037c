"""Records in their usual shapes, validated and turned into one of two: a conversation, or stretches of text.

{"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}     OpenAI's shapes; `weight` or `train` on a turn
{"conversations": [{"from": "human", "value": ...}, ...]}              ShareGPT's
{"prompt": ..., "completion": ...}                                     texts, or lists of messages
{"instruction": ..., "input": ..., "output": ..., "system": ...}       `input` and `system` may be absent
    with "references": [...]      more outputs that are right; the first is the output where that is absent. SQuAD's object too
    with "choices": [...]         those of a multiple choice, the output among them
{"text": ...}                                                          task `text`

A field that is null is absent. Every other field is used, named in `data.ignore`, or refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from trainspec.errors import meant, nearest
from trainspec.tasks import TASKS, PromptForm, TaskName, write_prompt
from trainspec.text.fields import BadRecord, choices_of, kind_of, parsed, text_of, with_output
from trainspec.text.sharegpt import ROLES, from_sharegpt

Message = dict[str, Any]

# Text fields that a message may have. Any other field must be named in the template.
TEXT_FIELDS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
MESSAGE_FIELDS = ("role", "content", "tool_calls", *TEXT_FIELDS)
LOSS_FIELDS = ("weight", "train")
# The required and the optional fields of each shape; the first required one identifies it.
SHAPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("tools",)),
    "conversations": (("conversations",), ("tools", "system")),
    "prompt and completion": (("prompt", "completion"), ("tools",)),
    "instruction": (("instruction", "output"), ("input", "system", "references", "choices")),
    "text": (("text",), ()),
}
FIELDS = tuple(dict.fromkeys(name for needed, more in SHAPES.values() for name in (*needed, *more)))
# Other common names of some fields.
ALIASES = {
    "question": "instruction",
    "query": "instruction",
    "context": "input",
    "answer": "output",
    "answers": "references",
    "response": "output",
    "functions": "tools",
    "system_prompt": "system",
}


@dataclass(frozen=True)
class Chat:
    """A conversation in Hugging Face's form; `learnt` marks the messages to train on."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    learnt: list[bool]


@dataclass(frozen=True)
class Text:
    """Stretches of text, each with whether it is trained on. `turns`: the stretches that begin a turn.

    `is_asked`: whether it is an instruction record in its task's prompt. `is_answered`: whether it is a prompt with an answer, which
    the metrics of `data.task` can judge: that, or a prompt and a completion.
    """

    stretches: list[tuple[str, bool]]
    turns: list[int] = field(default_factory=list)
    is_asked: bool = False
    is_answered: bool = False

    @property
    def is_blank(self) -> bool:
        """Whether there is no text in it."""
        return not any(text.strip() for text, _ in self.stretches)


@dataclass
class Encoded:
    """A record as tokens: `counts` marks the targets; `turns` are the tokens that begin a turn; `notes` are for the user."""

    ids: list[int]
    counts: list[bool]
    turns: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reader:
    """Reads the records of a file, by the settings of `data` that matter for it. Raises BadRecord.

    `prompt` is how an instruction record is asked; None: as the task does in English.
    """

    task: TaskName
    columns: Mapping[str, str] = field(default_factory=dict)
    ignore: frozenset[str] = frozenset()
    system: str | None = None
    prompt: PromptForm | None = None

    def read(self, record: object, template_for: Callable[[object], str | None]) -> Chat | Text:
        """One record; `template_for(tools)` is the text of the chat template, which may allow more roles and fields."""
        if not isinstance(record, dict):
            raise BadRecord(f"a record is a JSON object, not {kind_of(record)}")
        fields = self.renamed(record)
        shape = self._shape(fields)
        self._refuse_unused(fields, shape)
        template = template_for(fields.get("tools") or None)
        match shape:
            case "messages":
                return self._chat(fields["messages"], fields, template)
            case "conversations":
                return self._chat(from_sharegpt(fields["conversations"]), fields, template)
            case "prompt and completion":
                return self._completion(fields, template)
            case "text":
                self._no_system(shape)
                return Text([(text_of(fields, "text"), True)])
            case _:
                return self._instruction(fields, template)

    def renamed(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """A record under our names, without ignored and absent fields; an absent output is the first reference."""
        kept = {key: value for key, value in record.items() if value is not None and key not in self.ignore}
        ours = {theirs: name for name, theirs in self.columns.items()}
        renamed = {ours.get(key, key): value for key, value in kept.items()}
        if len(renamed) < len(kept):
            name = next(name for name, theirs in self.columns.items() if name in kept and theirs in kept)
            raise BadRecord(
                f"both {name!r} and {self.columns[name]!r}, which data.columns takes for it; name one of them in data.ignore"
            )
        return with_output(renamed)

    def renamed_already(self) -> Reader:
        """The reader of records under our names."""
        return replace(self, columns={})

    def shape_of(self, record: object) -> str:
        """Which of SHAPES a record has."""
        if not isinstance(record, dict):
            raise BadRecord(f"a record is a JSON object, not {kind_of(record)}")
        return self._shape(self.renamed(record))

    def _shape(self, fields: Mapping[str, Any]) -> str:
        if self.task == "text" and "text" in fields:
            return "text"
        for shape, (needed, _) in SHAPES.items():
            if needed[0] in fields and shape != "text":
                missing = [name for name in needed if name not in fields]
                if missing:
                    raise BadRecord(
                        f"{needed[0]!r} without {missing[0]!r}{self._as_columns(fields, missing)}"
                    )
                if self.task == "text":
                    raise BadRecord(
                        f"{needed[0]!r} with data.task=text, which takes a 'text'; leave data.task out"
                    )
                return shape
        if self.task == "text":
            raise BadRecord(f"no 'text'{self._as_columns(fields, ('text',))}")
        if "text" in fields:
            raise BadRecord("a record with 'text' is plain text; set data.task=text")
        raise BadRecord(
            f"no 'instruction' and 'output', 'messages', 'conversations' or 'prompt' and 'completion'"
            f"{self._as_columns(fields, ('instruction', 'output'))}"
        )

    def _as_columns(self, fields: Mapping[str, Any], missing: Sequence[str]) -> str:
        """The end of a message for fields that have other names."""
        unknown = [name for name in fields if name not in FIELDS]
        if not unknown:
            return f" among {', '.join(map(repr, fields))}" if fields else ": the record is empty"
        pairs = ", ".join(f"{ours}: {theirs}" for ours, theirs in _likely(unknown, missing))
        return f" among {', '.join(map(repr, fields))}; say which is which, such as data.columns={{{pairs}}}"

    def _refuse_unused(self, fields: Mapping[str, Any], shape: str) -> None:
        needed, more = SHAPES[shape]
        unused = [name for name in fields if name not in (*needed, *more)]
        if unused:
            named = ", ".join(map(repr, unused))
            likely = {ALIASES[name]: name for name in unused if ALIASES.get(name) in more}
            pairs = ", ".join(f"{ours}: {theirs}" for ours, theirs in likely.items() if ours not in fields)
            raise BadRecord(
                f"field{'s' * (len(unused) > 1)} {named} {'are' if len(unused) > 1 else 'is'} not used beside {needed[0]!r}"
                f"{_meant_of(unused[0], fields, (*needed, *more))}; set data.ignore=[{', '.join(unused)}]"
                f"{f', or map it: data.columns={{{pairs}}}' if pairs else ''}"
            )

    def _no_system(self, shape: str) -> None:
        if self.system is not None:
            raise BadRecord(f"data.system is given, and a record of {shape!r} cannot have one; leave it out")

    def _instruction(self, fields: Mapping[str, Any], template: str | None) -> Chat | Text:
        texts = {
            key: text_of(fields, key) if key in fields else "" for key in ("instruction", "input", "system")
        }
        output = text_of(fields, "output")
        choices_of(fields)
        if not texts["instruction"].strip() and not texts["input"].strip():
            return Text([])
        if self.task == "conversation":
            question = "\n".join(text for text in (texts["instruction"], texts["input"]) if text)
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
            return self._chat(turns, {key: fields[key] for key in fields if key == "system"}, template)
        texts = {key: value.strip() for key, value in texts.items()}
        system = texts["system"] or (self.system or "").strip()
        prompt = self.prompt if self.prompt is not None else TASKS[self.task].prompts["en"]
        asked = write_prompt(prompt, instruction=texts["instruction"], text=texts["input"])
        stretches = [(f"{system}\n" * bool(system) + asked, False), (output, True)]
        return Text(stretches, is_asked=True, is_answered=True)

    def _completion(self, fields: Mapping[str, Any], template: str | None) -> Chat | Text:
        prompt, completion = fields["prompt"], fields["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            chat = self._chat([*prompt, *completion], fields, template)
            start = len(chat.learnt) - len(completion) if isinstance(chat, Chat) else 0
            if isinstance(chat, Chat):
                learnt = [flag and i >= start for i, flag in enumerate(chat.learnt)]
                return Chat(chat.messages, chat.tools, learnt)
            raise BadRecord("messages as prompt and completion need a chat template; set data.chat_template")
        if isinstance(prompt, list) or isinstance(completion, list):
            raise BadRecord(
                f"'prompt' is {kind_of(prompt)} and 'completion' {kind_of(completion)}; give two texts, or two lists of messages"
            )
        if "tools" in fields:
            raise BadRecord("'tools' with a prompt that is text; give 'messages'")
        self._no_system("prompt and completion")
        stretches = [(text_of(fields, "prompt"), False), (text_of(fields, "completion"), True)]
        return Text(stretches, is_answered=True)

    def _chat(self, value: object, fields: Mapping[str, Any], template: str | None) -> Chat | Text:
        if not isinstance(value, list):
            raise BadRecord(f"'messages' must be a list, not {kind_of(value)}")
        messages, learnt = [], []
        for message in value:
            read, is_learnt = self._message(message, template)
            messages.append(read)
            learnt.append(is_learnt)
        system = text_of(fields, "system") if "system" in fields else self.system
        has_own = bool(messages) and messages[0]["role"] in ("system", "developer")
        if "system" in fields and has_own:
            raise BadRecord("a 'system' field and a conversation that begins with one")
        if system and not has_own and messages:
            messages, learnt = [{"role": "system", "content": system}, *messages], [False, *learnt]
        tools = _tools(fields["tools"]) if "tools" in fields else None
        return (
            Chat(messages, tools, learnt) if template is not None else _written_out(messages, tools, learnt)
        )

    def _message(self, value: object, template: str | None) -> tuple[Message, bool]:
        """A message in Hugging Face's form, and whether it is trained on."""
        if not isinstance(value, dict):
            raise BadRecord(f"a message is a JSON object, not {kind_of(value)}")
        message = {k: v for k, v in value.items() if v is not None and k not in self.ignore}
        role = message.get("role")
        if not isinstance(role, str):
            raise BadRecord(f"every message needs a text 'role', not {message!r:.80}")
        if role == "developer" and "developer" not in (template or ""):
            message["role"] = "system"  # its older name
        elif role not in ROLES and not _names(template, role):
            raise BadRecord(f"unknown role {role!r}{nearest(role, ROLES)}")
        for name in message:
            if name not in (*MESSAGE_FIELDS, *LOSS_FIELDS) and not _names(template, name):
                raise BadRecord(
                    f"field {name!r} of a message is not used{nearest(name, (*MESSAGE_FIELDS, *LOSS_FIELDS))}; "
                    "name it in data.ignore"
                )
        for name in TEXT_FIELDS:
            if name in message:
                text_of(message, name)
        learnt = _learnt(message)
        for name in LOSS_FIELDS:
            message.pop(name, None)
        if "tool_calls" in message:
            if role != "assistant":
                raise BadRecord(f"'tool_calls' on a turn of role {role!r}: only the assistant calls tools")
            message["tool_calls"] = _tool_calls(message["tool_calls"])
            if not message["tool_calls"]:
                del message["tool_calls"]
        if "content" in message:
            message["content"] = _joined(message["content"])
        elif "tool_calls" not in message:
            raise BadRecord(f"every message needs a text 'content', or tool calls, not {value!r:.80}")
        return message, learnt


def _likely(unknown: Sequence[str], missing: Sequence[str]) -> list[tuple[str, str]]:
    """Which of a record's unknown fields may be ours: those written almost alike, or else other names of the `missing` ones."""
    close = [
        (ours[0], name) for name in unknown if (ours := get_close_matches(name, FIELDS, n=1, cutoff=0.8))
    ]
    if close:
        return close
    known = {ALIASES[name]: name for name in unknown if name in ALIASES}
    if "output" not in known and "references" in known:
        missing = ["references" if name == "output" else name for name in missing]
    theirs = known | ({"completion": known["output"]} if "output" in known else {})
    return [(name, theirs.get(name, "YOUR_FIELD")) for name in missing]


def _meant_of(word: str, there: Collection[str], known: Sequence[str]) -> str:
    """`nearest`, which does not take a field for one that the record has."""
    return meant(word, set(known) - set(there)) or f"; known here: {', '.join(sorted(known))}"


def _names(template: str | None, word: str) -> bool:
    return template is not None and any(quote in template for quote in (f"'{word}'", f'"{word}"', f".{word}"))


def _joined(content: object) -> str:
    """The text of a message, whose content may be a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRecord(f"'content' must be text or a list of parts, not {content!r:.80}")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise BadRecord(f"a part of 'content' is {kind!r:.40}; only parts of type 'text' are trained")
        if more := [name for name in part if name not in ("type", "text")]:
            raise BadRecord(f"field {more[0]!r} of a part of 'content' is not used; name it in data.ignore")
        texts.append(part["text"])
    return "".join(texts)


def _learnt(message: Message) -> bool:
    is_assistant = message["role"] == "assistant"
    values = {name: message[name] for name in LOSS_FIELDS if name in message}
    for name, value in values.items():
        if value not in (0, 1):
            raise BadRecord(f"{name!r} is {value!r:.40}; a turn is learnt or not: give 0 or 1, true or false")
        if value and not is_assistant:
            raise BadRecord(
                f"{name!r} on a turn of role {message['role']!r}: only the assistant's are learnt"
            )
    return is_assistant and all(map(bool, values.values()))


def _tool_calls(value: object) -> list[dict[str, Any]]:
    """Tool calls as templates read them: arguments are an object, not JSON text."""
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise BadRecord(f"'tool_calls' must be a list of objects, not {value!r:.80}")
    calls = []
    for call in value:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRecord(f"a tool call needs a function with a name, not {call!r:.80}")
        arguments = {} if function.get("arguments") is None else function["arguments"]
        if isinstance(arguments, str):
            arguments = parsed(arguments, "the arguments of a tool call") if arguments.strip() else {}
        if not isinstance(arguments, dict):
            raise BadRecord(f"the arguments of a tool call must be an object, not {arguments!r:.80}")
        if more := [name for name in (*call, *function) if name in LOSS_FIELDS]:
            raise BadRecord(f"{more[0]!r} on a tool call: a turn is learnt as a whole or not at all")
        function = function | {"arguments": arguments}
        calls.append(call | {"function": function} if "function" in call else function)
    return calls


def _tools(value: object) -> list[dict[str, Any]] | None:
    """Descriptions of tools, given as a list or as JSON text; None where there are none."""
    if isinstance(value, str):
        value = parsed(value, "'tools'") if value.strip() else []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRecord(f"'tools' must be a list of JSON schemas, not {value!r:.80}")
    return value or None


def _written_out(messages: Iterable[Message], tools: object, learnt: Sequence[bool]) -> Text:
    """A conversation without a template: each message as its role on a line and then its content."""
    stretches: list[tuple[str, bool]] = []
    turns = []
    for message, is_learnt in zip(messages, learnt, strict=True):
        if tools or "tool_calls" in message:
            raise BadRecord("tools need a chat template, and the tokenizer has none; set data.chat_template")
        if more := [name for name in TEXT_FIELDS if name in message]:
            raise BadRecord(
                f"field {more[0]!r} of a message needs a chat template, and the tokenizer has none; "
                "set data.chat_template, or name it in data.ignore"
            )
        turns.append(len(stretches))
        stretches.append((f"{message['role'].capitalize()}:\n", False))
        stretches.append((message["content"].strip() + "\n", is_learnt))
    return Text(stretches, turns)
