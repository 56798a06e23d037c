"""Code of torch and Hugging Face written out in `substitutes`, so that a single line of it can be edited.

A library's own source is not edited; an edit of torchtrain substitutes the written-out code. That alone is no mistake (a
test shows that the check passes), so any effect comes from the edited line.
"""

from __future__ import annotations

from parity.runs.edit import Edit

ATTENTION = "parity.faults.substitutes.torch_attention"
ATTENTION_WRITTEN_OUT = (
    Edit(
        "torchtrain.model:build_model",
        "return __model",
        f"from {ATTENTION} import put_into\nput_into(__model)\nreturn __model",
    ),
)
ADAMW = "parity.faults.substitutes.torch_adamw:ExplicitAdamW.step"
ADAMW_WRITTEN_OUT = (
    Edit("torchtrain.optim:make_optimizer", "torch.optim.AdamW", "ExplicitAdamW"),
    Edit(
        "torchtrain.optim:make_optimizer",
        "",
        "from parity.faults.substitutes.torch_adamw import ExplicitAdamW",
    ),
)
