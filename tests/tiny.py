"""Tiny stand-ins with random weights: a LLaVA, SAEs, inputs. And `snapshot`, which sees all that a hook could leave."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

SIDE, PATCH, N_PATCHES = 32, 8, 16
D_IN, N_LAYERS, D_SAE = 32, 4, 48
BOS, IMAGE = 1, 4
"""As in the bundled tokenizer."""


def build_llava(vocabulary: int = 64, seed: int = 0, width: int = D_IN, tower: str = "clip") -> Any:
    """A LLaVA whose weights are all random, so that the image really reaches the logits."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    vision = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[tower](
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=BOS,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        image_seq_length=N_PATCHES,
    )
    model = LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(is_norm + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def build_processor() -> Any:
    """The bundled world's processor, for this tower's resolution."""
    from sauce_hooks.scenes.training import build_processor

    processor = build_processor()
    processor.image_processor.size = {"shortest_edge": SIDE}
    processor.image_processor.crop_size = {"height": SIDE, "width": SIDE}
    return processor


def model_inputs(n: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """What a processor would give for `n` random images and one question."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.tensor([BOS, *[IMAGE] * N_PATCHES, 7, 8, 9])
    ids = row.repeat(n, 1)
    pixels = torch.randn(n, 3, SIDE, SIDE, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def pictures(n: int, seed: int = 0) -> list[Image.Image]:
    """Random RGB images."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(n)]


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor] | None = None) -> Tensor:
    """The model's answer to `inputs`."""
    return model(**(inputs or model_inputs())).logits


def make_sae(
    architecture: str = "jumprelu",
    *,
    d_in: int = D_IN,
    d_sae: int = D_SAE,
    seed: int = 0,
    dtype: str = "float32",
    **options: Any,
) -> Any:
    """An SAE-Lens SAE, every weight random; thresholds positive."""
    from sae_lens.registry import get_sae_class

    sae_class, config_class = get_sae_class(architecture)
    sae = sae_class(config_class(d_in=d_in, d_sae=d_sae, dtype=dtype, device="cpu", **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name == "threshold":
                noise = 0.1 + noise.abs()
            elif name.startswith("W_"):
                noise = noise / d_in**0.5
            parameter.copy_(noise if name == "threshold" or name.startswith("W_") else 0.3 * noise)
    return sae.eval()


def make_vision_sae(model: Any, architecture: str = "jumprelu", **options: Any) -> Any:
    """A `VisionSAE` of the model's default hook point, with a bank of three concepts of which two share a feature."""
    from sauce_hooks import Concept, ConceptBank, VisionSAE, find_hook_point

    sae = VisionSAE.wrap(make_sae(architecture, **options), find_hook_point(model))
    sae.concepts = ConceptBank(
        [Concept("red", (1, 2, 3)), Concept("tiger", (3, 4, 5)), Concept("blue", (6, 7), (0.5, 0.25), gamma=-2.0)]
    )
    return sae


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Class, mode, attributes and hook tables of every module, by identity."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):  # hooks, parameters, buffers, children: order counts
            return [(key, id(entry)) for key, entry in value.items()]
        return value if isinstance(value, bool | int | str | None) else id(value)

    return {
        name: (type(module), {key: plain(value) for key, value in vars(module).items()})
        for name, module in model.named_modules()
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every weight."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
