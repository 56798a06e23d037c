"""What makes an update: DeepSpeed, its pipeline, or plain torch, one file each."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from torchtrain._deepspeed import runs_on_deepspeed
from torchtrain.cluster import SESSION
from torchtrain.engines.deepspeed import DeepSpeedEngine
from torchtrain.engines.engine import Engine
from torchtrain.engines.pipeline import PipelineEngine
from torchtrain.engines.plain import PlainEngine
from torchtrain.mesh import Mesh
from trainspec.runs.run import Run

__all__ = ["make_engine"]


def make_engine(run: Run, model: PreTrainedModel, optimizer: torch.optim.AdamW, *, mesh: Mesh) -> Engine:
    """DeepSpeed's engine, or its pipeline's; for fp64, which DeepSpeed has not, plain torch with the same arithmetic."""
    engine: Engine
    if run.recipe.plan.pipe > 1:
        engine = PipelineEngine(run, model, optimizer, mesh=mesh)
    elif runs_on_deepspeed(run.recipe):
        engine = DeepSpeedEngine(run, model, optimizer, mesh=mesh)
    else:
        engine = PlainEngine(run, model, optimizer, mesh=mesh)
    SESSION.engines.append(engine.close)
    return engine
