"""transformers' Trainer, for modules that give their own loss of a batch."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn


def fit(
    module: nn.Module, batches: Sequence[Mapping[str, Any]], *, steps: int, lr: float, seed: int, max_grad_norm: float = 1.0
) -> None:
    """Minimise the "loss" that `module(**batch)` gives, a batch a step, in an order that follows from the seed.

    Nothing is written that stays, printed or reported.

    Args:
        module: its parameters that ask for gradients are trained, in place.
        batches: what it is called with; begun anew when all have been seen.
        steps: of AdamW without weight decay, with a linear schedule from `lr` to 0.
        lr: learning rate.
        seed: of the order of the batches.
        max_grad_norm: gradients are clipped to this norm.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch,
            max_steps=steps,
            learning_rate=lr,
            max_grad_norm=max_grad_norm,
            per_device_train_batch_size=1,  # of batches
            weight_decay=0.0,
            seed=seed,
            data_seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=next(module.parameters()).device.type == "cpu",
            dataloader_pin_memory=False,
        )
        data: Any = list(batches)
        trainer = Trainer(module, arguments, train_dataset=data, data_collator=_only)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def _only(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return dict(batches[0])
