"""Parts of torch and Hugging Face written out, so that one line of them can be changed.

A library's own source is not edited: the part is put into its place by an edit of torchtrain. That is no mistake by
itself (a test shows that the check passes), so what a changed line does is that line's doing.
"""

from __future__ import annotations

from parity.plant import Edit, edited

ATTENTION = """from types import MethodType


def _attention(self, hidden_states, position_embeddings, attention_mask, **rest):
    B, S, _ = hidden_states.shape
    projections = (self.q_proj, self.k_proj, self.v_proj)
    q, k, v = (p(hidden_states).view(B, S, -1, self.head_dim).transpose(1, 2) for p in projections)
    q_tables, k_tables = position_embeddings[:2], position_embeddings[:2]
    q, k = _turned(q, *q_tables), _turned(k, *k_tables)
    k, v = (t.repeat_interleave(self.num_key_value_groups, dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * self.scaling
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    shares = scores.softmax(-1)
    return self.o_proj((shares @ v).transpose(1, 2).reshape(B, S, -1)), None


def _turned(x, cos, sin):
    cos, sin = cos[:, None], sin[:, None]
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


"""
ADAMW = """class _AdamW(torch.optim.AdamW):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (b1, b2), lr, eps, decay = group["betas"], group["lr"], group["eps"], group["weight_decay"]
            for p in group["params"]:
                s = self.state[p]
                s["step"] += 1
                t = s["step"].item()
                s["exp_avg"].mul_(b1).add_(p.grad, alpha=1 - b1)
                s["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                m = s["exp_avg"] / (1 - b1**t)
                v = s["exp_avg_sq"] / (1 - b2**t)
                p.sub_(lr * m / (v.sqrt() + eps) + lr * decay * p)


"""


def torch_attention(*changes: tuple[str, str]) -> tuple[Edit, ...]:
    """torchtrain with the attention written out, and `changes` (old text, new text) in it."""
    put_in = "    for layer in model.model.layers:\n"
    put_in += "        layer.self_attn.forward = MethodType(_attention, layer.self_attn)\n"
    return (
        Edit("torchtrain.model", "def build_model(", _changed(ATTENTION, changes) + "def build_model("),
        *torch_model(put_in),
    )


def torch_model(code: str) -> tuple[Edit, ...]:
    """torchtrain with `code` (lines of a function, indented) run on every `model` that it builds."""
    return (Edit("torchtrain.model", "    return model\n", f"{code}    return model\n"),)


def torch_adamw(*changes: tuple[str, str]) -> tuple[Edit, ...]:
    """torchtrain with AdamW written out, and `changes` (old text, new text) in it."""
    return (
        Edit("torchtrain.optim", "def make_optimizer(", _changed(ADAMW, changes) + "def make_optimizer("),
        Edit("torchtrain.optim", "optimizer = torch.optim.AdamW(", "optimizer = _AdamW("),
    )


def _changed(text: str, changes: tuple[tuple[str, str], ...]) -> str:
    return edited(text, [Edit("written out", old, new) for old, new in changes])
