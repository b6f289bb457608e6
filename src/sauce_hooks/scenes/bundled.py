"""The bundled model: loading it, and knowing whether it knows enough."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sauce_hooks.errors import ModelBelowGateError

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from sauce_hooks.sae import VisionSAE


def asset(name: str) -> Path:
    """The folder of something that ships: "model" or "sae"."""
    return Path(str(files("sauce_hooks.scenes") / "assets" / name))


def load_model(folder: str | Path | None = None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A trained model and its processor, as any Hugging Face VLM is loaded; the bundled one by default."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = asset("model") if folder is None else folder
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
    # The Pillow backend: torchvision, which the other one needs, is not among the dependencies.
    processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    return model.eval(), processor


def load() -> tuple[LlavaForConditionalGeneration, LlavaProcessor, VisionSAE]:
    """The bundled vision-language model, its processor, and its SAE with a bank of every concept of the world."""
    from sauce_hooks.sae import VisionSAE

    model, processor = load_model()
    return model, processor, VisionSAE.load(asset("sae"))


Relative = Literal["larger", "finer"]
"""Relatives of the bundled model: its tower under a larger language model; and four times the pixels (scenes.relatives)."""


def load_relative(name: Relative) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A model to carry the bundled SAE over to, and its processor.

    Its file holds what it does not share with the bundled model, in half the bytes.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

    folder = asset(name)
    bundled, _ = load_model()
    model: Any = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    own = {key: tensor.float() for key, tensor in load_file(folder / "own.safetensors").items()}
    shared = {key: tensor for key, tensor in bundled.state_dict().items() if key not in own and key in model.state_dict()}
    with torch.no_grad():
        model.load_state_dict({**shared, **own})
    model.generation_config = GenerationConfig.from_pretrained(folder)
    processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    return model.eval(), processor


def load_paper_sae() -> VisionSAE:
    """The SAE of the paper's settings to the letter, for comparison; its bank holds k features a concept at γ = −0.5."""
    import torch

    from sauce_hooks.sae import VisionSAE

    paper = VisionSAE.load(asset("sae_paper"))
    paper.sae.to(dtype=torch.float32)  # it ships in half the bytes
    return paper


@dataclass(frozen=True)
class Competence:
    """What the original model knows, on held-out scenes."""

    yes_no: dict[str, float]
    """Balanced yes/no accuracy by domain."""
    named: float
    """Share of the true concepts that descriptions name."""
    false: float
    """Share of the concepts that descriptions name which are not true."""

    MIN_YES_NO = 0.97
    MIN_NAMED = 0.95
    MAX_FALSE = 0.03

    @property
    def passed(self) -> bool:
        """Whether the model is above its gate."""
        return min(self.yes_no.values()) >= self.MIN_YES_NO and self.named >= self.MIN_NAMED and self.false <= self.MAX_FALSE

    def require(self) -> Competence:
        """Itself, or `ModelBelowGateError` with the figures: nothing measured on such a model counts."""
        if not self.passed:
            raise ModelBelowGateError(
                f"the model is below its competence gate: yes/no {self.yes_no} (at least {self.MIN_YES_NO}), true concepts "
                f"named {self.named:.3f} (at least {self.MIN_NAMED}), false ones {self.false:.3f} (at most {self.MAX_FALSE})"
            )
        return self


def competence(
    model: Any, processor: Any, *, per_concept: int = 60, describe: int = 300, split: Any = "test", phrasing: int = 0
) -> Competence:
    """Measure the competence gate on scenes never trained on."""
    from sauce_hooks.evaluation.answers import ask, prepare
    from sauce_hooks.evaluation.probes import Probe, Question
    from sauce_hooks.scenes.probes import wording
    from sauce_hooks.scenes.world import CONCEPTS, DOMAINS, sample

    words = wording(phrasing)
    questions: list[Question] = []
    for i, concept in enumerate(CONCEPTS):
        for kind in ({"contains": concept}, {"lacks": concept}):
            scenes = sample(per_concept, seed=500_000 + i, split=split, **kind)
            questions += [Question(Probe(s.image, s.concepts), "yes_no", concept) for s in scenes]
    scenes = sample(describe, seed=600_000, split=split)
    questions += [Question(Probe(s.image, s.concepts), "describe", None) for s in scenes]
    answers = list(ask(model, prepare(questions, words, processor, 64), words, processor))
    asked = [a for a in answers if a.question.kind == "yes_no"]
    yes_no = {}
    for domain, names in DOMAINS.items():
        right = [a.correct for a in asked if a.question.concept in names]
        yes_no[domain] = sum(right) / len(right)
    said = true = both = 0
    for a in answers:
        if a.question.kind == "describe":
            named = {c for c in CONCEPTS if words.mentions(a.text, c)}
            said, true = said + len(named), true + len(a.question.probe.concepts)
            both += len(named & a.question.probe.concepts)
    return Competence(yes_no, both / true, (said - both) / max(1, said))
