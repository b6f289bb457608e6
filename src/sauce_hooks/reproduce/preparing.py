"""What an experiment with a real model needs before anything is measured: images, an SAE, concepts, learning rates.

Each is kept in the folder of results as soon as it is there, so that a run that was ended goes on. In several processes
(`accelerate launch`) they train the SAE together and share the rest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sauce_hooks.activations import World
from sauce_hooks.bank import Concept, ConceptBank
from sauce_hooks.bank.files import write_text_atomically
from sauce_hooks.concepts import learn_concept
from sauce_hooks.errors import ConfigError, ContrastError, ImagesError, ModelBelowGateError, ResumeError
from sauce_hooks.evaluation import Probe, Wording, tune_concept, wording
from sauce_hooks.evaluation.baselines import ForgetRetain, Retrained, forget_retain, own_descriptions, sweep
from sauce_hooks.evaluation.labelled import Opening, Split
from sauce_hooks.evaluation.store import fingerprint_of, slug
from sauce_hooks.hookpoint import evaluating, find_hook_point
from sauce_hooks.reproduce.collected import Collection, Pool, collect, load_data
from sauce_hooks.reproduce.config import Model, Protocol, read
from sauce_hooks.reproduce.sharing import once, share
from sauce_hooks.sae import VisionSAE, train_sae
from sauce_hooks.sae.checkpoint import changes

_VALIDATED, _VALIDATED_RETAINED = 16, 4
"""Validation images of a concept that learning rates are chosen on, and of each retained one."""


@dataclass(frozen=True)
class Folder:
    """Where everything is kept."""

    path: Path

    @property
    def protocol(self) -> Path:
        """What it was prepared for."""
        return self.path / "protocol.json"

    @property
    def images(self) -> Path:
        """Which images are used."""
        return self.path / "images.json"

    @property
    def sae(self) -> Path:
        """The SAE, if it is trained here."""
        return self.path / "sae"

    @property
    def weights(self) -> Path:
        """What rivals have learnt."""
        return self.path / "weights"

    def concept(self, name: str) -> Path:
        """A concept: `bank/` beside this file, or why there is none."""
        return self.path / "concepts" / slug(name) / "done.json"

    def rate(self, method: str) -> Path:
        """A method's learning rate, and all that was tried."""
        return self.path / "rates" / f"{slug(method)}.json"


def prepare(config: str | Path, out: str | Path, *, progress: bool = True) -> None:
    """Prepare an experiment, or go on with that; what is there already is left as it is.

    Args:
        config: the name of a configuration that ships, or the path of a TOML file.
        out: the folder of results.
        progress: show progress bars.

    Raises:
        ConfigError: the configuration cannot be, or the model, the SAE or a dataset cannot be loaded.
        ImagesError: no concept of a task has enough images, or none can be learnt.
        ResumeError: `out` was prepared for another configuration; says what differs.
    """
    protocol, folder = read(config), Folder(Path(out))
    world = World.current()
    once(folder.protocol, lambda path: write_text_atomically(path, json.dumps(protocol.prepared, indent=1)))
    check(protocol, folder)
    once(folder.images, lambda path: collect(protocol).save(path))
    model, processor = load_model(protocol.model)
    with evaluating(model):
        sae = _trained(protocol, folder, model, processor, world, progress)
        pool = Pool.of(protocol, Collection.load(folder.images), {})
        todo = [concept for concept in pool.concepts if concept not in sae.concepts]
        share(todo, folder.concept, partial(_learn, protocol, folder, model, processor, sae, pool))
        _, left_out = learnt(folder, sae, todo)
        pool = Pool.of(protocol, Collection.load(folder.images), left_out)
        require(protocol, pool)
        share(protocol.rivals.to_sweep, folder.rate, partial(_sweep, protocol, folder, model, processor, pool, progress))


def check(protocol: Protocol, folder: Folder) -> None:
    """`ResumeError` if a folder was prepared for something else, or for nothing."""
    try:
        then = json.loads(folder.protocol.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ResumeError(
            f"{folder.path} holds nothing that is prepared for {protocol.name} ({problem}): "
            "call sauce_hooks.reproduce.preparing.prepare(config, out) first"
        ) from problem
    if differing := changes(then, protocol.prepared):
        raise ResumeError(
            f"{folder.path} was prepared for another configuration: {'; '.join(differing[:8])}. Give another folder, or "
            "remove this one to begin anew"
        )


def require(protocol: Protocol, pool: Pool) -> None:
    """`ImagesError` if a task has no concept left."""
    for domain_task in dict.fromkeys(domain.task for domain in protocol.domains):
        concepts = [c for domain in protocol.domains if domain.task == domain_task for c in domain.concepts]
        if not any(concept in pool.concepts for concept in concepts):
            reasons = "; ".join(f"{c}: {pool.left_out[c]}" for c in concepts[:6] if c in pool.left_out)
            raise ImagesError(f"no {domain_task} concept is left to erase. {reasons}")


def load_model(settings: Model) -> tuple[Any, Any]:
    """A model and its processor: on this process's own device if several were started, else wherever it fits.

    Raises:
        ConfigError: it cannot be loaded; says why, and what to do.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    world = World.current()
    options: dict[str, Any] = {} if settings.revision is None else {"revision": settings.revision}
    spread = {"device_map": "auto"} if world.size == 1 and torch.cuda.is_available() else {}
    backend = {} if find_spec("torchvision") else {"backend": "pil"}
    try:
        processor: Any = AutoProcessor.from_pretrained(settings.id, **options, **backend)
        model: Any = AutoModelForImageTextToText.from_pretrained(settings.id, dtype=settings.dtype, **options, **spread)
    except (OSError, ValueError, ImportError) as problem:
        raise ConfigError(
            f"the model {settings.id!r} cannot be loaded: {problem}. It must be a vision-language model on the Hugging Face "
            "hub, or a folder that save_pretrained wrote. For gated weights accept the licence on the model's page, then "
            "`hf auth login`; without a network they must be in the cache already"
        ) from problem
    if world.size > 1:
        from accelerate import PartialState

        model = model.to(PartialState().device)
    return model.eval(), processor


def _trained(protocol: Protocol, folder: Folder, model: Any, processor: Any, world: World, progress: bool) -> VisionSAE:
    """The SAE: loaded, or trained by all processes together."""
    wanted = protocol.sae
    if wanted.source is not None:
        return load_sae(protocol, folder)
    if not all(world.objects((folder.sae / "vision_sae.json").is_file())):
        assert wanted.dataset is not None
        train_sae(
            model,
            load_data(wanted.dataset, wanted.split, "sae.dataset"),
            processor=processor,
            preset=wanted.preset,
            hook_point=find_hook_point(model, protocol.model.layer),
            tokens=None if wanted.tokens is None else wanted.tokens.policy,
            out=folder.sae,
            resume=True,
            n_images=wanted.n_images,
            image_batch_size=wanted.image_batch_size,
            workers=wanted.workers,
            progress=progress and world.is_first,
            **wanted.changes,
        )
    return load_sae(protocol, folder)


def load_sae(protocol: Protocol, folder: Folder) -> VisionSAE:
    """The SAE of an experiment, with the bank it came with.

    Raises:
        ConfigError: there is none.
    """
    source = protocol.sae.source
    if source is None and not (folder.sae / "vision_sae.json").is_file():
        raise ResumeError(f"{folder.sae} holds no trained SAE: prepare the experiment first")
    try:
        return VisionSAE.load(folder.sae if source is None else source)
    except Exception as problem:
        if source is None:
            raise
        raise ConfigError(
            f"sae.source: {source!r} is no SAE that can be loaded ({type(problem).__name__}: {problem}). Give a folder that "
            "`sauce-hooks train-sae` wrote, an id on the hub, or leave source out to train one"
        ) from problem


# Concepts. -------------------------------------------------------------------------------------------------------------


def _learn(protocol: Protocol, folder: Folder, model: Any, processor: Any, sae: VisionSAE, pool: Pool, concept: str) -> None:
    """Learn one concept by itself, so that it is the same whatever was learnt before it, and by whom."""
    wanted, done = protocol.learning, folder.concept(concept)
    apart = VisionSAE(sae.sae, sae.hook_point, sae.tokens, tower=sae.tower)  # with a bank of its own
    positives = Opening(pool.holding(concept))
    siblings = {name: Opening(pool.others(concept, [name], wanted.per_sibling)) for name in pool.siblings(concept)}
    siblings = {name: images for name, images in siblings.items() if len(images) > 1}
    try:
        if wanted.how == "paper":
            negatives = Opening(pool.others(concept, pool.concepts, wanted.negatives))
            options: dict[str, Any] = {"k": wanted.k, "gamma": wanted.gamma, "batch_size": protocol.batch_size}
            learn_concept(model, apart, concept, positives, negatives, processor=processor, **options)
        else:
            elsewhere = [name for name in pool.concepts if name not in siblings and name != concept]
            negatives = Opening(pool.others(concept, elsewhere or pool.concepts, wanted.negatives))
            tune_concept(
                model,
                apart,
                concept,
                positives,
                negatives,
                processor=processor,
                siblings=siblings or None,
                wording=words(protocol, processor),
                tuning={"ks": wanted.ks, "gammas": wanted.gammas},
                batch_size=protocol.batch_size,
            )
    except (ContrastError, ImagesError, ModelBelowGateError) as problem:
        write_text_atomically(done, json.dumps({"left_out": str(problem)}))
        return
    ConceptBank([apart.concepts[concept]], sae=apart.record()).save(done.parent / "bank")
    write_text_atomically(done, json.dumps({"left_out": None}))


def learnt(folder: Folder, sae: VisionSAE, names: Sequence[str]) -> tuple[ConceptBank, dict[str, str]]:
    """The concepts that were learnt, and why the others were not.

    Raises:
        ResumeError: one was not tried yet, or its file is damaged.
    """
    found: list[Concept] = []
    left_out: dict[str, str] = {}
    for name in names:
        path = folder.concept(name)
        try:
            reason = json.loads(path.read_text(encoding="utf-8"))["left_out"]
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise ResumeError(f"{name!r} is not prepared ({problem}): prepare the experiment first") from problem
        if reason is None:
            found.append(ConceptBank.load(path.parent / "bank")[name])
        else:
            left_out[name] = str(reason)
    return ConceptBank(found, sae=sae.record()), left_out


# Rivals. ---------------------------------------------------------------------------------------------------------------


def words(protocol: Protocol, processor: Any) -> Wording:
    """How the model is asked."""
    asked = protocol.questions
    return wording(processor, phrasing=asked.phrasing, max_new_tokens=asked.max_new_tokens)


@dataclass(eq=False)
class Descriptions:
    """What the original model says of images, asked once and kept in a folder, a file an image."""

    model: nn.Module
    processor: Any
    wording: Wording
    folder: Path

    def __call__(self, probes: Sequence[Probe]) -> list[str]:
        """A description of each."""
        asked = f"{fingerprint_of(self.model)} {self.wording.describe()} {self.wording.max_new_tokens}"
        folder = self.folder / sha256(asked.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        describe = own_descriptions(self.model, self.wording, self.processor)
        for probe in probes:  # one by one: what is said is kept at once
            if not (path := folder / f"{probe.name}.txt").exists():
                with evaluating(self.model):
                    write_text_atomically(path, describe([probe])[0])
        return [(folder / f"{probe.name}.txt").read_text(encoding="utf-8") for probe in probes]


@dataclass(eq=False)
class Lessons:
    """Of a concept, what weight-updating methods are trained on: the images that features are chosen from."""

    pool: Pool
    wording: Wording
    describe: Descriptions
    splits: tuple[Split, ...] = ("train", "val")

    def __call__(self, concept: str) -> ForgetRetain:
        """The forget set of a concept, and as many images of the others of its domain."""
        holding = self.pool.holding(concept, self.splits)
        siblings = self.pool.siblings(concept)
        others = self.pool.others(concept, siblings, len(holding), self.splits)
        return forget_retain(concept, holding, others, (concept, *siblings), self.wording, self.describe)


def lessons(protocol: Protocol, folder: Folder, model: Any, processor: Any, pool: Pool) -> Lessons:
    """As the configuration has it."""
    asked = words(protocol, processor)
    return Lessons(pool, asked, Descriptions(model, processor, asked, folder.path / "descriptions"))


def _sweep(protocol: Protocol, folder: Folder, model: Any, processor: Any, pool: Pool, progress: bool, method: str) -> None:
    """Choose one method's learning rate on validation images, which it is not trained on."""
    rivals = protocol.rivals
    data = lessons(protocol, folder, model, processor, pool)
    data.splits = ("train",)
    concepts = [concept for concept in rivals.swept if concept in pool.concepts]
    if not concepts:
        reasons = "; ".join(f"{concept}: {pool.left_out.get(concept)}" for concept in rivals.swept)
        raise ConfigError(f"rivals.swept: none of these is left to choose learning rates on ({reasons}); name others")
    candidates = {
        method: {
            lr: Retrained(model, processor, method, data, rivals.trained_with(lr), folder.weights) for lr in rivals.tried
        }
    }
    shown = pool.probes(data.wording, _VALIDATED, _VALIDATED_RETAINED, split="val")
    options: dict[str, Any] = {"processor": processor, "batch_size": protocol.batch_size, "progress": progress}
    found = sweep(model, candidates, shown, concepts, **options)[method]
    tried = {f"{lr:g}": None if math.isnan(merit) else merit for lr, merit in found.merits.items()}
    chosen = {"method": method, "lr": found.chosen, "at_an_end": found.at_an_end, "merits": tried, "concepts": concepts}
    write_text_atomically(folder.rate(method), json.dumps(chosen, indent=1))


def rates(protocol: Protocol, folder: Folder) -> Mapping[str, float]:
    """The learning rates: given, or found.

    Raises:
        ResumeError: one was not looked for yet.
    """
    found = dict(protocol.rivals.rates)
    for method in protocol.rivals.to_sweep:
        try:
            found[method] = float(json.loads(folder.rate(method).read_text(encoding="utf-8"))["lr"])
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise ResumeError(f"no learning rate for {method} ({problem}): prepare the experiment first") from problem
    return found
