"""A model for lmms-eval: a Hugging Face vision-language model, with an eraser on or without; see docs/lmms-eval.md.

`lmms-eval --model sauce --model_args pretrained=...,sae=...,erase=red+tiger --tasks mme,pope`
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval learns of the model, by the entry point `sauce` of the group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="sauce", simple_class_path="sauce_hooks.lmms.model.SauceModel")
