"""An erasure distilled into a LoRA adapter: weights that imitate it, and how far they fall short.

The adapter is PEFT's and trained by transformers' Trainer; here are only the loss and the account of what remains.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sauce_hooks.activations import iter_inputs
from sauce_hooks.activations.images import to_device
from sauce_hooks.erasure import ConceptEraser
from sauce_hooks.erasure.bake import Erasure, shared_copy
from sauce_hooks.erasure.edit_data import take_apart
from sauce_hooks.errors import EditError, ImagesError
from sauce_hooks.evaluation.fitting import fit
from sauce_hooks.evaluation.probes import ProbeSet
from sauce_hooks.evaluation.results import ORIGINAL, Results
from sauce_hooks.hookpoint import PIXELS, HookPoint, as_tokens, evaluating, find_towers, unwrap

if TYPE_CHECKING:
    from peft import PeftModel

Batch = Mapping[str, Any]
"""Model inputs of some images."""

_HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class Gap:
    """What is left between an adapter and the erasure it imitates, over all tokens of some images."""

    remaining: float
    """‖x_student − x_erased‖ / ‖x − x_erased‖: 0 is the erasure itself, 1 is as far off as doing nothing."""
    elsewhere: float
    """‖x_student − x‖ / ‖x‖ over the tokens that the erasure leaves alone; its own is 0."""
    n_images: int


@dataclass(frozen=True)
class Distilled:
    """A model with an adapter that imitates an erasure, and what was measured of it."""

    model: PeftModel
    """`model.save_pretrained(folder)` writes the adapter, `model.merge_and_unload()` makes it part of the weights."""
    before: Gap
    """On the images held out, untrained."""
    after: Gap
    """On the same, trained."""
    results: Results | None = field(default=None, repr=False)
    """The metrics of the original model, the eraser and the adapter, if there were probes."""


def distill(
    eraser: ConceptEraser,
    images: Any,
    *,
    processor: Any = None,
    held_out: Any = None,
    rank: int = 16,
    blocks: int | None = None,
    steps: int = 1000,
    lr: float = 2e-3,
    batch_size: int = 32,
    seed: int = 0,
    probes: ProbeSet | None = None,
) -> Distilled:
    """Train a LoRA adapter on the vision tower to give, without the eraser, what the tower gives with it.

    The loss is the squared distance between the student's activations at the hook point and the erased ones, over all
    tokens, as a share of what the erasure changes; so its root is the gap. The weights themselves stay as they are: the
    adapter is on a second model that shares them.

    Args:
        eraser: what to imitate; not one for rows.
        images: to train on, with and without the concepts; all of them are held in memory as model inputs.
        processor: the model's processor; not needed for batches of model inputs.
        held_out: images to measure the gap on; None: every tenth batch of `images`, which is not trained on.
        rank: of the adapter's matrices.
        blocks: how many blocks, counted back from the hook point, get an adapter; None: all up to there.
        steps: of AdamW, with a linear schedule from `lr` to 0.
        lr: learning rate.
        batch_size: images a step.
        seed: of the adapter's first weights and of the order of batches; the result follows from it.
        probes: measure forgetting and retention with these too, for each of the eraser's concepts that they know.

    Raises:
        EditError: an eraser for rows, or at no block of a vision tower.
        ImagesError: too few images to train on and measure with, none that the erasure changes, or inputs without pixels.
    """
    if eraser.rows is not None:
        raise EditError("an eraser for rows cannot be distilled: weights do not know whose rows they are given")
    batches = list(iter_inputs(images, processor, batch_size))
    if held_out is None:
        tested = batches[::_HELD_OUT_EVERY]
        batches = [batch for i, batch in enumerate(batches) if i % _HELD_OUT_EVERY]
    else:
        tested = list(iter_inputs(held_out, processor, batch_size))
    if not batches or not tested:
        raise ImagesError(f"{len(batches)} batches to train on and {len(tested)} to measure with: give more images")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = _with_adapter(eraser, rank, blocks)
        imitation = _Imitation(student, eraser)
        imitation.scale = imitation.mean_change(batches)
        before = imitation.gap(tested)
        fit(imitation, batches, steps=steps, lr=lr, seed=seed)
    after = imitation.gap(tested)
    student.eval()
    results = None if probes is None else _evaluated(eraser, student, probes, processor)
    return Distilled(student, before, after, results)


class _Imitation(nn.Module):
    """The student, and as its loss how far it is from the erasure; what the Trainer trains."""

    def __init__(self, student: PeftModel, eraser: ConceptEraser) -> None:
        super().__init__()
        self.student = student
        self.point = eraser.hook_point
        self.erasure = Erasure(self.point, take_apart([eraser.edit]))
        self.scale = 1.0
        """The mean over images of ‖x − x_erased‖²."""

    def train(self, mode: bool = True) -> _Imitation:
        """Always as in evaluation: with dropout there would be nothing fixed to imitate."""
        del mode
        return super().train(False)

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        """The loss of one batch."""
        _, erased_utd = self._target(inputs)
        student_utd = _activations(self.student, self.point, inputs)
        return {"loss": (student_utd - erased_utd).float().square().sum() / (self.scale * _n_images(inputs))}

    @torch.no_grad()
    def _target(self, inputs: Batch) -> tuple[Float[Tensor, "units tokens d"], Float[Tensor, "units tokens d"]]:
        """The activations as they are, and erased."""
        with self.student.disable_adapter():
            acts_utd = _activations(self.student, self.point, inputs)
        return acts_utd, self.erasure.to(acts_utd.device).edited(acts_utd)

    def mean_change(self, batches: Sequence[Batch]) -> float:
        """The mean over images of ‖x − x_erased‖²; `ImagesError` if the erasure changes nothing."""
        changed = sum(float((x - erased).float().square().sum()) for x, erased in map(self._target, batches))
        if not changed:
            raise ImagesError("the erasure changes nothing in these images: give some that hold its concepts")
        return changed / sum(map(_n_images, batches))

    @torch.no_grad()
    def gap(self, batches: Sequence[Batch]) -> Gap:
        """What is left to imitate."""
        sums: Tensor = torch.zeros(4, dtype=torch.float64)
        for inputs in batches:
            acts_utd, erased_utd = (t.double() for t in self._target(inputs))
            student_utd = _activations(self.student, self.point, inputs).double()
            alone = (erased_utd == acts_utd).all(-1)
            pairs = ((student_utd, erased_utd), (acts_utd, erased_utd), (student_utd[alone], acts_utd[alone]))
            squares = [(a - b).square().sum() for a, b in pairs]
            sums += torch.stack([*squares, acts_utd[alone].square().sum()]).cpu()
        if not sums[1]:
            raise ImagesError("the erasure changes nothing in the images held out: give some that hold its concepts")
        remaining, elsewhere = (sums[0] / sums[1]).sqrt(), (sums[2] / sums[3].clamp_min(1e-30)).sqrt()
        return Gap(float(remaining), float(elsewhere), sum(map(_n_images, batches)))


def _with_adapter(eraser: ConceptEraser, rank: int, blocks: int | None) -> PeftModel:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as problem:
        raise ImportError("distilling into an adapter takes PEFT: pip install 'sauce-hooks[baselines]'") from problem

    point = eraser.hook_point
    paths = [path for tower in find_towers(unwrap(eraser.model)) for path, _ in tower.blocks if tower.path == point.tower]
    if point.path not in paths:
        raise EditError(f"{point.path} is no block of a vision tower: only an erasure there can be distilled into one")
    end = paths.index(point.path) + 1
    chosen = tuple(f"{path}." for path in paths[0 if blocks is None else max(0, end - blocks) : end])
    student = shared_copy(unwrap(eraser.model))
    linear = [name for name, m in student.named_modules() if isinstance(m, nn.Linear) and name.startswith(chosen)]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear, bias="none")
    return get_peft_model(student, config)  # pyright: ignore[reportReturnType] - not a mixed model


def _activations(model: Any, point: HookPoint, inputs: Batch) -> Float[Tensor, "units tokens d"]:
    """What the hooked block gives in a forward of the tower, with its gradient."""
    root = unwrap(model)
    tower, seen = point.tower_module(root), list[Any]()
    pixels = next((inputs[name] for name in PIXELS if name in inputs), None)
    if pixels is None:
        raise ImagesError(f"the batch has no pixel_values (it has {', '.join(inputs)}): these are no images' inputs")
    names = list(inspect.signature(tower.forward).parameters)
    parameter = next(p for p in tower.parameters() if p.is_floating_point())
    arguments = to_device({**{name: inputs[name] for name in names if name in inputs}, names[0]: pixels}, parameter)
    handle = point.module(root).register_forward_hook(lambda module, args, output: seen.append(output), prepend=True)
    try:
        tower(**arguments)
    finally:
        handle.remove()
    return as_tokens(seen[0], point)


def _n_images(inputs: Batch) -> int:
    return len(next(inputs[name] for name in PIXELS if name in inputs))


def _evaluated(eraser: ConceptEraser, student: PeftModel, probes: ProbeSet, processor: Any) -> Results:
    """Every metric of the original model, the eraser and the student."""
    from sauce_hooks.evaluation.run import evaluate

    known = {name for names in probes.domains.values() for name in names}
    concepts = [concept.name for concept in eraser.concepts if concept.name in known]
    options: dict[str, Any] = {"processor": processor, "progress": False}
    with evaluating(student):
        taught = evaluate(eraser.model, eraser.sae, probes, concepts, methods={"eraser": lambda concept: eraser}, **options)
        learnt = evaluate(unwrap(student), None, probes, concepts, methods={}, **options)
    renamed = {("distilled", concept): (ORIGINAL, concept) for concept in concepts}
    return replace(
        taught,
        scores={**taught.scores, **{key: learnt.scores[was] for key, was in renamed.items()}},
        counts={**taught.counts, **{key: learnt.counts[was] for key, was in renamed.items()}},
    )
