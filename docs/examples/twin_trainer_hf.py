"""The plain transformers Trainer, recorded. Its twin is the loop in twin_trainer_loop.py; see docs/record-a-trace.md.

python docs/examples/twin_trainer_hf.py runs/trainer/hf
"""

from argparse import ArgumentParser
from tempfile import TemporaryDirectory
from typing import Any

import torch
import twin_trainer_data as shared
from transformers import Trainer, TrainerCallback, TrainingArguments

from parity import Recorder


class RecordingTrainer(Trainer):
    """Keeps what lies between backward and clip: no callback is called there, but training_step ends there.

    It runs once for each accumulation slice, and the last one of an update leaves the whole gradient.
    """

    slices: tuple[dict[str, torch.Tensor], ...] = ()
    loss_sum = 0.0

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The Trainer's own forward and backward pass of a slice."""
        self.slices = (*self.slices, dict(inputs))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.tokens = int(num_items_in_batch)  # of all slices of the update
        self.loss_sum += loss.item() * self.tokens
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        return loss


class Record(TrainerCallback):
    """Records after each update: before the scheduler's step, so that the rate is still this update's."""

    def __init__(self, trainer: RecordingTrainer, recorder: Recorder, *, after_clip: bool) -> None:
        self.trainer, self.recorder, self.after_clip = trainer, recorder, after_clip

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Is called after the clip: too late for the gradients."""
        if self.after_clip:
            self.trainer.gradients = {name: p.grad.clone() for name, p in model.named_parameters()}

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """The weights and moments are those after the update, the gradients of the model are clipped."""
        trainer, weights = self.trainer, dict(model.named_parameters())
        moments = [
            {n: optimizer.state[p][key] for n, p in weights.items()} for key in ("exp_avg", "exp_avg_sq")
        ]
        self.recorder.step(
            batch={key: torch.cat([each[key] for each in trainer.slices]) for key in ("input_ids", "labels")},
            loss_sum=trainer.loss_sum, tokens=trainer.tokens, lr=optimizer.param_groups[0]["lr"],
            gradients=trainer.gradients, weights=weights, moment1=moments[0], moment2=moments[1],
        )  # fmt: skip
        trainer.slices, trainer.loss_sum = (), 0.0


def main() -> None:
    """Train and record."""
    parser = ArgumentParser()
    parser.add_argument("trace", help="where the trace goes")
    parser.add_argument("--after-clip", action="store_true", help="a mistake: records the clipped gradients")
    args = parser.parse_args()
    with TemporaryDirectory() as output:
        settings = TrainingArguments(
            output, max_steps=shared.STEPS, per_device_train_batch_size=shared.EXAMPLES,
            gradient_accumulation_steps=shared.SLICES, learning_rate=shared.LR, warmup_steps=shared.WARMUP,
            max_grad_norm=shared.CLIP, weight_decay=shared.DECAY, optim="adamw_torch", use_cpu=True,
            train_sampling_strategy="sequential", report_to="none", save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        trainer = RecordingTrainer(
            shared.model(), settings, train_dataset=shared.examples(), compute_loss_func=shared.token_loss
        )
        names = {name: name for name, _ in trainer.model.named_parameters()}
        recorder = Recorder(args.trace, names=names, program="Trainer", precision="fp64")
        recorder.initial(dict(trainer.model.named_parameters()))
        trainer.add_callback(Record(trainer, recorder, after_clip=args.after_clip))
        trainer.train()


if __name__ == "__main__":
    main()
