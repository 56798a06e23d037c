"""Parts of torch and Hugging Face written out in `substitutes`, so that one line of them can be changed.

A library's own source is not edited: the part is put into its place by an edit of torchtrain. That is no mistake by
itself (a test shows that the check passes), so what a changed line does is that line's doing.
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
