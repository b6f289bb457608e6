"""An erasure distilled into a LoRA adapter: closer with training, the original untouched, the figures those of the seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sauce_hooks import ConceptEraser, VisionSAE
from sauce_hooks.errors import EditError, ImagesError
from tiny import logits, model_inputs, pictures, snapshot, weights

pytest.importorskip("peft")

from sauce_hooks.evaluation.distill import Distilled, distill

pytestmark = pytest.mark.filterwarnings("ignore")
IMAGES = [model_inputs(8, seed)["pixel_values"] for seed in range(4)]


def batches(indices: Any) -> list[dict[str, torch.Tensor]]:
    return [{"pixel_values": IMAGES[i]} for i in indices]


def tiny(model: Any, sae: VisionSAE, steps: int = 40, **options: Any) -> Distilled:
    eraser = ConceptEraser(model, sae, ["tiger"])
    held_out = options.pop("held_out", batches([0]))
    return distill(eraser, batches([1, 2, 3]), held_out=held_out, rank=8, steps=steps, lr=1e-2, **options)


def test_the_gap_shrinks_and_the_original_stays(model: Any, sae: VisionSAE, tmp_path: Path):
    before, kept, bare = snapshot(model), weights(model), logits(model)
    student = tiny(model, sae)
    assert student.before.remaining == pytest.approx(1, abs=1e-6) and student.before.elsewhere == 0
    assert student.after.remaining < 0.9
    assert student.after.n_images == 8
    assert snapshot(model) == before
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())
    assert not torch.equal(logits(student.model), bare)
    with student.model.disable_adapter():  # which is how anybody takes it off again
        assert torch.equal(logits(student.model), bare)
    student.model.save_pretrained(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_only_blocks_up_to_the_hook_point_are_adapted(model: Any, sae: VisionSAE):
    for blocks, expected in ((None, {"0", "1", "2"}), (1, {"2"})):
        adapted = tiny(model, sae, steps=1, blocks=blocks).model
        names = [name for name, p in adapted.named_parameters() if p.requires_grad]
        assert {name.partition("vision_tower.encoder.layers.")[2].partition(".")[0] for name in names} == expected


def test_the_seed_decides(model: Any, sae: VisionSAE):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    gaps = [tiny(model, sae, steps=3, seed=seed).after for seed in (0, 0, 1)]
    assert gaps[0] == gaps[1] != gaps[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_every_tenth_batch_is_held_out(model: Any, sae: VisionSAE, processor: Any):
    eraser = ConceptEraser(model, sae, ["tiger"])
    student = distill(eraser, pictures(24), processor=processor, steps=1, batch_size=2)
    assert student.after.n_images == 4  # batches 0 and 10 of twelve


def test_what_cannot_be_distilled_is_refused(model: Any, sae: VisionSAE):
    eraser = ConceptEraser(model, sae, ["tiger"])
    with pytest.raises(EditError, match="for rows"):
        distill(eraser.for_rows([["tiger"]]), batches([0, 1]))
    with pytest.raises(ImagesError, match="give more images"):
        distill(eraser, batches([0]))
    with pytest.raises(ImagesError, match="changes nothing"):
        distill(ConceptEraser(model, sae, []), batches([0, 1]))
