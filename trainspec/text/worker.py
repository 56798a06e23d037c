"""The process that imports transformers: `python -m trainspec.text.worker PARENT`. One line of JSON in, one line out.

A request is {"do": "fill" | "prompts" | "encode" | "pieces" | "said" | "identify", ...}; an answer is {"result": ...} or, for a user's
mistake, {"error": its line}. The process ends when its input does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from typing import Any

from trainspec.parent import end_with


def main() -> None:
    """Serve until the input ends. What libraries print, such as `Ignored unknown kwarg option`, is discarded."""
    end_with(int(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        for line in sys.stdin:
            answers.write(json.dumps(_answer(json.loads(line))) + "\n")
            answers.flush()
    except KeyboardInterrupt:  # the parent is interrupted as well, and reports it
        os._exit(128 + signal.SIGINT)


def import_transformers() -> None:
    """Import it without torch, as where that is not installed: half of the time, and tokens need none of it.

    It remembers that there is no torch. For others, such as datasets, there is again.
    """
    if "transformers" in sys.modules:
        return
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that models cannot be used
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]  # an import of it fails, as Python's reference has it
    try:
        import transformers.models.auto.tokenization_auto  # noqa: F401
    finally:
        del sys.modules["torch"]


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    from trainspec.errors import UserError

    try:
        return {"result": _do(request)}
    except UserError as error:
        return {"error": str(error)}
    except OSError as error:
        return {"os_error": [error.errno, error.strerror or str(error), error.filename]}
    except BaseException as error:  # a panic of the tokenizers library is not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return {"crash": f"{type(error).__name__}: {error}", "stack": traceback.format_exc()}


def _do(request: dict[str, Any]) -> Any:
    # Imported with the first request, so that a failure to import is an answer, too.
    import_transformers()
    from trainspec.text.fill import encoder_of, fill, identify, prompts_of

    match request["do"]:
        case "fill":
            return fill(request)
        case "identify":
            return identify(request["source"])
        case "prompts":
            return prompts_of(request)
    encoder = encoder_of(request["tokenizer"], None, request["date"], request["digest"])
    match request["do"]:
        case "encode":
            return encoder.encode_plain(request["text"])
        case "pieces":
            return [[encoder.pieces(ids), encoder.decode(ids)] for ids in request["ids"]]
        case "said":
            return [encoder.said(ids) for ids in request["ids"]]
        case other:
            raise AssertionError(f"no such request: {other}")


if __name__ == "__main__":
    main()
