"""Make the demo data in configs/data from the docstrings of Python's own standard library.

    python scripts/make_demo_data.py [OUT]

Every file is sorted by name and holds no randomness: the same Python gives the same bytes. What is held out is
decided by a hash of the name, so a function is held out of all files or of none. configs/data/README.md says
what each file holds.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

# Modules under the PSF licence alone: those whose source carries another notice or borrowed code (asyncio,
# logging, re, sqlite3, tarfile, tomllib, turtle, xml, ...) are left out.
MODULES = (
    "abc", "argparse", "array", "ast", "base64", "binascii", "bisect", "builtins", "bz2", "calendar", "cmath",
    "cmd", "code", "codeop", "collections", "collections.abc", "colorsys", "compileall", "concurrent.futures",
    "configparser", "contextlib", "contextvars", "copy", "copyreg", "csv", "dataclasses", "datetime",
    "difflib", "dis", "doctest", "email.charset", "email.generator", "email.header", "email.headerregistry",
    "email.message", "email.parser", "email.policy", "email.utils", "enum", "filecmp", "fileinput", "fnmatch",
    "fractions", "ftplib", "functools", "gc", "getopt", "getpass", "gettext", "glob", "graphlib", "gzip",
    "hashlib", "heapq", "hmac", "html", "html.parser", "http.client", "http.cookiejar", "http.server",
    "imaplib", "importlib", "importlib.abc", "importlib.machinery", "importlib.metadata",
    "importlib.resources", "importlib.util", "inspect", "io", "ipaddress", "itertools", "json", "keyword",
    "linecache", "locale", "lzma", "mailbox", "marshal", "math", "mimetypes", "mmap", "modulefinder",
    "multiprocessing", "multiprocessing.connection", "multiprocessing.managers", "multiprocessing.pool",
    "multiprocessing.shared_memory", "netrc", "numbers", "operator", "os", "os.path", "pathlib", "pdb",
    "pickle", "pickletools", "pkgutil", "plistlib", "poplib", "pprint", "pstats", "py_compile", "pyclbr",
    "pydoc", "queue", "quopri", "random", "reprlib", "runpy", "sched", "secrets", "select", "selectors",
    "shelve", "shlex", "shutil", "signal", "site", "smtplib", "socket", "ssl", "stat", "statistics", "string",
    "struct", "subprocess", "symtable", "sys", "sysconfig", "tabnanny", "tempfile", "textwrap", "threading",
    "time", "timeit", "token", "tokenize", "traceback", "tracemalloc", "types", "typing", "unicodedata",
    "unittest", "unittest.case", "unittest.loader", "unittest.suite", "urllib.error", "urllib.parse",
    "urllib.request", "urllib.response", "uuid", "venv", "warnings", "wave", "weakref", "webbrowser",
    "wsgiref.handlers", "wsgiref.headers", "wsgiref.util", "zipapp", "zipfile", "zipimport", "zlib",
    "zoneinfo",
)  # fmt: skip

HELD_OUT_ONE_IN = 11
# Records that fit the demo's rows of 128 tokens with the prompt around them.
CALL_CHARACTERS = range(6, 80)
SENTENCE_CHARACTERS = range(16, 110)
DOCUMENT_CHARACTERS = range(240, 1200)

INSTRUCTIONS = (
    "What does this Python {kind} do?",
    "Describe this Python {kind} in one sentence.",
    "What is this Python {kind} for?",
    "Say what this {kind} of Python's standard library does.",
)


@dataclass(frozen=True)
class Entry:
    """One documented name: `call` is the name with its parameters, `sentence` the first of `document`."""

    name: str
    kind: str  # function, method or class
    call: str
    sentence: str
    document: str

    def hashed(self, salt: str) -> int:
        """A stable pseudo-random number of the name; each use has its own `salt`."""
        return int.from_bytes(hashlib.sha256(f"{salt}:{self.name}".encode()).digest()[:8], "big")

    @property
    def held_out(self) -> bool:
        """Whether this name belongs to the held-out files."""
        return self.hashed("split") % HELD_OUT_ONE_IN == 0


def main(out: Path) -> None:
    """Write every data file and the licence into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    entries = read_entries()
    train = [e for e in entries if not e.held_out]
    heldout = [e for e in entries if e.held_out]
    for split, part, counts in (("train", train, (1200, 150, 360)), ("heldout", heldout, (120, 30, 36))):
        records, chats, documents = counts
        write(out / f"qa-{split}.jsonl", map(json_line, map(qa_record, choose(part, records, salt="qa"))))
        write(out / f"chat-{split}.jsonl", map(json_line, map(chat_record, choose(part, chats, salt="chat"))))
        long = [e for e in part if len(e.document) in DOCUMENT_CHARACTERS]
        chosen = choose(long, documents, salt="text")
        write(out / f"text-{split}.txt", ["\n\n".join(e.document for e in chosen) + "\n"])
    licence = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    write(out / "LICENSE-PSF.txt", [licence.read_text(encoding="utf-8")])


def choose(entries: Sequence[Entry], count: int, *, salt: str) -> list[Entry]:
    """`count` of the entries, picked by hash, in the order of their names."""
    usable = [e for e in entries if salt == "text" or _is_short(e)]
    if len(usable) < count:
        raise SystemExit(
            f"{salt}: {len(usable)} usable entries, {count} wanted; add modules or widen the bounds"
        )
    return sorted(sorted(usable, key=lambda e: e.hashed(salt))[:count], key=lambda e: e.name)


def qa_record(entry: Entry) -> dict[str, str]:
    """An instruction record: what to do, the call it is about, and the first sentence of its docstring."""
    template = INSTRUCTIONS[entry.hashed("instruction") % len(INSTRUCTIONS)]
    return {"instruction": template.format(kind=entry.kind), "input": entry.call, "output": entry.sentence}


def chat_record(entry: Entry) -> dict[str, list[dict[str, str]]]:
    """A conversation about one name: its purpose, its call, or one after the other."""
    purpose, call = entry.sentence, f"Call it as {entry.call}"
    conversations = (
        (("user", f"What does {entry.name} do?"), ("assistant", purpose),
         ("user", "And how do I call it?"), ("assistant", call)),
        (("user", f"How do I call {entry.name}?"), ("assistant", call),
         ("user", "What will it do?"), ("assistant", purpose)),
        (("system", "Answer in one sentence."), ("user", f"What is the {entry.kind} {entry.name} for?"),
         ("assistant", purpose)),
    )  # fmt: skip
    turns = conversations[entry.hashed("conversation") % len(conversations)]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def read_entries() -> list[Entry]:
    """The documented names of all modules, sorted; of those with the same first sentence only the first."""
    found: dict[str, Entry] = {}
    for path in MODULES:
        for name, kind, value in _public(path, importlib.import_module(path)):
            entry = _entry(name, kind, value)
            if entry is not None:
                found.setdefault(name, entry)
    distinct: dict[str, Entry] = {}
    for name in sorted(found):
        distinct.setdefault(_words(found[name].sentence), found[name])
    return list(distinct.values())


def _public(path: str, module: ModuleType) -> Iterator[tuple[str, str, object]]:
    """(dotted name, kind, object) of a module's own functions and classes and of the classes' methods."""
    members = vars(module)
    for name, value in sorted(members.items()):
        own = name in members["__all__"] if "__all__" in members else inspect.getmodule(value) is module
        if name.startswith("_") or not own:
            continue
        dotted = f"{path}.{name}"
        if inspect.isclass(value):
            yield dotted, "class", value
            for method, function in sorted(vars(value).items()):
                if not method.startswith("_") and inspect.isroutine(function):
                    yield f"{dotted}.{method}", "method", inspect.unwrap(function)
        elif inspect.isroutine(value):
            yield dotted, "function", value


def _entry(name: str, kind: str, value: object) -> Entry | None:
    """The entry of one object; None where its docstring does not start with a sentence in words."""
    document = inspect.cleandoc(value.__doc__) if isinstance(value.__doc__, str) else ""
    paragraph = " ".join(document.partition("\n\n")[0].split())
    sentence = re.match(r"[A-Z][^()=<>|]*?[a-z)\"'][.](?=\s|$)", paragraph)
    if sentence is None or sentence[0].endswith(("e.g.", "i.e.", "etc.", "vs.")):
        return None
    call = name.removeprefix("builtins.") + _parameters(value, bound=kind == "method")
    # A document is one block: its own blank lines would read as the border to the next one.
    block = "\n".join(line.rstrip() for line in document.splitlines() if line.strip())
    return Entry(name.removeprefix("builtins."), kind, call, sentence[0], f"{call}\n{block}")


def _parameters(value: object, *, bound: bool) -> str:
    """`(data, *, n=4)` as a caller sees it, or nothing where Python does not know the parameters."""
    if not callable(value):
        return ""
    try:
        parameters = list(inspect.signature(value).parameters.values())
    except (TypeError, ValueError):
        return ""
    if bound and parameters and parameters[0].name in ("self", "cls"):
        del parameters[0]
    plain = [
        p.replace(annotation=p.empty, kind=p.POSITIONAL_OR_KEYWORD if p.kind == p.POSITIONAL_ONLY else p.kind)
        for p in parameters
    ]
    text = str(inspect.Signature(plain))
    return "" if "=<" in text else text  # a default without a literal form, perhaps an address


def _is_short(entry: Entry) -> bool:
    return (
        len(entry.call) in CALL_CHARACTERS
        and len(entry.sentence) in SENTENCE_CHARACTERS
        and "(" in entry.call
    )


def _words(sentence: str) -> str:
    return " ".join(re.findall(r"\w+", sentence.lower()))


def json_line(record: object) -> str:
    """A record as a line of its file."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def write(path: Path, parts: Iterable[str]) -> None:
    """Write a file and say how large it is."""
    path.write_text("".join(parts), encoding="utf-8")
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "configs/data"))
