"""The page of samples: prompts, references and answers side by side, for whoever reads what a model says."""

from __future__ import annotations

from html import escape

from trainspec.evaluation.evaluation import Evaluation
from trainspec.evaluation.table import table

# More than these are in predictions.jsonl; a reader has seen enough.
SHOWN = 100
_STYLE = (
    "body{font-family:sans-serif;margin:2em}pre{white-space:pre-wrap;margin:0;font-size:90%}"
    "table{border-collapse:collapse;width:100%;table-layout:fixed}td,th{border:1px solid #ccc;padding:.4em;"
    "vertical-align:top;text-align:left}tbody tr:nth-child(even){background:#f6f6f6}"
)


def page(evaluation: Evaluation) -> str:
    """The page as HTML that needs nothing else."""
    models, asked = evaluation.models, evaluation.asked
    heads = "".join(f"<th>{escape(name)}</th>" for name in ("prompt", "reference", *models))
    rows = []
    for index, question in enumerate(asked[:SHOWN]):
        cells = [question.prompt.prompt, "\n".join(question.references)]
        cells += [measurement.generations[index].text for measurement in models.values()]
        rows.append("<tr>" + "".join(f"<td><pre>{escape(cell)}</pre></td>" for cell in cells) + "</tr>")
    more = f"<p>The first {SHOWN} of {len(asked)}; all are in predictions.jsonl.</p>" * (len(asked) > SHOWN)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>What the model says</title>'
        f"<style>{_STYLE}</style></head><body>\n<pre>{escape(chr(10).join(table(evaluation)))}</pre>\n{more}"
        f"<table><thead><tr>{heads}</tr></thead><tbody>\n{chr(10).join(rows)}\n</tbody></table></body></html>\n"
    )
