"""The demonstration: the bundled model forgets "red" and "tiger", in the terminal and on one HTML page."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from sauce_hooks import __version__
from sauce_hooks.activations import read_tokens
from sauce_hooks.bank import Concept
from sauce_hooks.erasure import ConceptEraser, MergedEdit
from sauce_hooks.evaluation import Answer, Probe, ProbeSet, Question, Results, ask, evaluate, prepare
from sauce_hooks.report import (
    Activating,
    Card,
    ChangeMap,
    ConceptFeatures,
    DemoPage,
    FeatureCard,
    Figure,
    YesNo,
    compare_words,
    metric_rows,
    tidy,
    write_page,
)
from sauce_hooks.report.figures import FAMILIES
from sauce_hooks.sae import VisionSAE
from sauce_hooks.scenes import bundled
from sauce_hooks.scenes.language import DESCRIBE, YES_NO
from sauce_hooks.scenes.probes import probes, wording
from sauce_hooks.scenes.world import CONCEPTS, SIBLINGS, Scene, sample, stream

ERASED = ("red", "tiger")
"""What the demonstration forgets."""
MEASURED = ("red", "tiger", "happy", "wood", "soccer")
"""The concepts it measures, one of each domain."""

_SHOWN = (("red", "tiger"), ("tiger",), ("red",), ("tiger",), ("red",), ())
"""The erased concepts that each image on the page holds."""
_SEED = 7_000
_CANDIDATES, _SEARCHED, _TOP_FEATURES, _TOP_IMAGES = 5, 300, 4, 6

CODE = """\
import sauce_hooks as sh

model, processor, sae = sh.scenes.load()
scene = sh.scenes.sample(1, seed=1, contains="tiger")[0]
inputs = processor(images=scene.image, text=sh.scenes.describe_prompt(), return_tensors="pt")

with sh.ConceptEraser(model, sae, ["red", "tiger"]):
    output = model.generate(**inputs)
print(processor.decode(output[0], skip_special_tokens=True))"""
COMMANDS = {
    "sauce-hooks demo": "This page, from the same seeds (in a clone of the repository: make demo):",
    "sauce-hooks table": "The whole table, all concepts and several methods side by side:",
}


def run(out: str | Path = "sauce_hooks_demo.html", *, quick: bool = False, console: Console | None = None) -> Path:
    """Show the bundled model forgetting, in the terminal and on a self-contained HTML page.

    Args:
        out: where to write the page.
        quick: measure two concepts on a few images instead of five on many.
        console: where to print; the terminal by default.

    Returns:
        The path of the page.
    """
    console = console or Console()
    Path(out).resolve().parent.mkdir(parents=True, exist_ok=True)  # better to fail now than in a minute
    page = content(quick=quick, console=console)
    path = write_page(page, out)
    _print(page, path, console)
    return path


def content(*, quick: bool = False, console: Console | None = None) -> DemoPage:
    """Everything the page shows, from the bundled model."""
    started = time.monotonic()
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with _one_thread(), Progress(*columns, console=console) as progress:
        with _step(progress, "load the model and its SAE"), _no_other_bars():
            model, processor, sae = bundled.load()
        with _step(progress, "draw scenes"):
            searched = _drawn(sample(60 if quick else _SEARCHED, seed=_SEED, split="val"))
        with _step(progress, "ask before and after"):
            shown = _choose(model, processor)
            cards = _cards(model, processor, sae, shown)
        n, retained = (8, 1) if quick else (30, 5)
        results = _measure(model, processor, sae, MEASURED[:2] if quick else MEASURED, n, retained, progress)
        with _step(progress, "look at the features"):
            features = _features(model, processor, sae, searched)
            maps = _maps(model, processor, sae, shown[:4])
    eraser = ConceptEraser(model, sae, ERASED)
    return DemoPage(
        erased=ERASED,
        n_features=len(eraser.features),
        describe=DESCRIBE["en"][0].capitalize(),
        yes_no=YES_NO["en"][0].capitalize(),
        cards=tuple(cards),
        results=results,
        measured_on=(
            f"For each, {n} held-out scenes with the concept and {n} without it, and {retained} with each of the other "
            "concepts."
        ),
        concepts=tuple(features),
        searched=len(searched),
        maps=tuple(maps),
        exact_elsewhere=eraser.edit.preserve_error,
        settings=_settings(sae, eraser),
        commands=COMMANDS,
        code=CODE,
        version=__version__,
        seconds=time.monotonic() - started,
    )


@contextmanager
def _step(progress: Progress, name: str) -> Generator[None]:
    task = progress.add_task(name, total=1)
    yield
    progress.advance(task)


@contextmanager
def _one_thread() -> Generator[None]:
    """The model is so small that a second thread gains little, and on a busy machine two wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _no_other_bars() -> Generator[None]:
    """Transformers' own progress bars would be drawn through ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# The images and the answers. ------------------------------------------------------------------------------------------


def _candidates(held: Sequence[str], seed: int) -> Iterator[Scene]:
    """Scenes that hold these erased concepts, no other, and more that might be lost; look-alikes, if none is held."""
    lookalikes = {SIBLINGS[concept] for concept in ERASED}
    others = [concept for concept in ERASED if concept not in held]
    for scene in stream(seed=seed, contains=held[-1] if held else None, lacks=others, split="test"):
        rest = scene.concepts - set(ERASED)
        if scene.concepts.issuperset(held) and len(scene.things) > 1 and len(rest) > 1 and (held or rest & lookalikes):
            yield scene


def _choose(model: nn.Module, processor: Any) -> list[Scene]:
    """Of each kind, the first scene that the original model describes without a mistake: what it can't see it can't forget.

    What the model says while it forgets has no part in the choice.
    """
    words = wording()
    kinds = [list(islice(_candidates(held, _SEED + i), _CANDIDATES)) for i, held in enumerate(_SHOWN)]
    scenes = [scene for kind in kinds for scene in kind]
    questions = [Question(Probe(scene.image, scene.concepts), "describe", None) for scene in scenes]
    answers = ask(model, prepare(questions, words, processor, batch_size=64), words, processor)
    named = (frozenset(c for c in CONCEPTS if words.mentions(answer.text, c)) for answer in answers)
    right = {id(scene) for scene, concepts in zip(scenes, named, strict=True) if concepts == scene.concepts}
    return [next((scene for scene in kind if id(scene) in right), kind[0]) for kind in kinds]


def _drawn(scenes: Sequence[Scene]) -> list[Scene]:
    for scene in scenes:
        _ = scene.image
    return list(scenes)


def _asked(scene: Scene) -> list[str]:
    """Which concepts to ask for: the erased ones, then all others that are true, then a look-alike that is not."""
    held = [concept for concept in ERASED if concept in scene.concepts]
    others = sorted(scene.concepts.difference(ERASED))
    absent = [c for c in (SIBLINGS[c] for c in (*held, *others)) if c not in scene.concepts and c not in ERASED]
    return [*(held or ERASED), *others, *absent[:1]]


def _cards(model: nn.Module, processor: Any, sae: VisionSAE, scenes: Sequence[Scene]) -> list[Card]:
    words = wording()
    shown = [Probe(scene.image, scene.concepts) for scene in scenes]
    asked = [_asked(scene) for scene in scenes]
    questions = [Question(probe, "describe", None) for probe in shown]
    questions += [Question(p, "yes_no", concept) for p, concepts in zip(shown, asked, strict=True) for concept in concepts]
    batches = prepare(questions, words, processor, batch_size=64)

    def answers() -> dict[tuple[int, str | None], str]:
        def key(answer: Answer) -> tuple[int, str | None]:
            return id(answer.question.probe), answer.question.concept

        return {key(answer): tidy(answer.text) for answer in ask(model, batches, words, processor)}

    before = answers()
    with ConceptEraser(model, sae, ERASED):
        after = answers()
    return [
        Card(
            image=probe.image,
            concepts=tuple(sorted(probe.concepts)),
            before=before[id(probe), None],
            after=after[id(probe), None],
            checks=tuple(
                YesNo(concept, concept in probe.concepts, before[id(probe), concept], after[id(probe), concept])
                for concept in concepts
            ),
        )
        for probe, concepts in zip(shown, asked, strict=True)
    ]


# The numbers. ---------------------------------------------------------------------------------------------------------


def _probes(concepts: Sequence[str], n: int, retained: int) -> ProbeSet:
    """The protocol's images: `n` for the concepts that are erased, and no more than are asked about for all others."""
    few = probes(retained, retained=retained)
    seeds = count(_SEED + 1_000)

    def draw(**kind: str) -> list[Probe]:
        return [Probe(s.image, s.concepts) for s in sample(n, seed=next(seeds), split="test", **kind)]

    return replace(
        few,
        positives={**few.positives, **{concept: draw(contains=concept) for concept in concepts}},
        negatives={**few.negatives, **{concept: draw(lacks=concept) for concept in concepts}},
    )


def _measure(
    model: nn.Module,
    processor: Any,
    sae: VisionSAE,
    concepts: Sequence[str],
    n: int,
    retained: int,
    progress: Progress,
) -> Results:
    with _step(progress, "draw the test images"):
        few = _probes(concepts, n, retained)
    task = progress.add_task("erase and measure each concept", total=len(concepts))

    @contextmanager
    def erasing(concept: str) -> Generator[None]:
        with ConceptEraser(model, sae, [concept]):
            yield
        progress.advance(task)

    return evaluate(
        model, sae, few, concepts, processor=processor, methods={"SAUCE": erasing}, batch_size=128, progress=False
    )


# The features and where they act. -------------------------------------------------------------------------------------


def _features(model: nn.Module, processor: Any, sae: VisionSAE, scenes: Sequence[Scene]) -> list[ConceptFeatures]:
    concepts = [sae.concepts[name] for name in ERASED]
    eraser = ConceptEraser(model, sae, ERASED)
    wanted = list(dict.fromkeys(f for concept in concepts for f in concept.features[:_TOP_FEATURES]))
    images = [scene.image for scene in scenes]
    batches = read_tokens(model, images, sae.hook_point, tokens="patches", processor=processor)
    z_btk = torch.cat([sae.encode(acts_btd)[..., wanted].cpu() for acts_btd in batches])
    z_of = {feature: z_btk[..., i] for i, feature in enumerate(wanted)}
    return [
        ConceptFeatures(
            name=concept.name,
            n_features=len(concept.features),
            gamma=eraser.edit.gammas[concept.features[0]],
            learnt_from=_provenance(concept),
            features=tuple(_feature_card(sae, concept, f, z_of[f], scenes) for f in concept.features[:_TOP_FEATURES]),
        )
        for concept in concepts
    ]


def _feature_card(
    sae: VisionSAE, concept: Concept, feature: int, z_bt: Float[Tensor, "images patches"], scenes: Sequence[Scene]
) -> FeatureCard:
    strength_b, patch_b = z_bt.max(1)
    top = [int(i) for i in strength_b.argsort(descending=True, stable=True)[:_TOP_IMAGES] if strength_b[i] > 0]
    return FeatureCard(
        index=feature,
        score=dict(zip(concept.features, concept.scores, strict=False)).get(feature),
        frequency=None if sae.stats is None else float(sae.stats.frequency_f[feature]),
        images=tuple(
            Activating(
                scenes[i].image,
                tuple(sorted(scenes[i].concepts)),
                float(strength_b[i]),
                _patch_box(int(patch_b[i]), z_bt.shape[1]),
            )
            for i in top
        ),
    )


def _patch_box(patch: int, n_patches: int) -> tuple[float, float, float, float]:
    side = round(n_patches**0.5)
    row, column = divmod(patch, side)
    return column / side, row / side, (column + 1) / side, (row + 1) / side


def _provenance(concept: Concept) -> str:
    known = concept.provenance
    if "positives" not in known or "negatives" not in known:
        return "chosen by hand"
    return f"scored on {known['positives']} images with it and {known['negatives']} without"


def _maps(model: nn.Module, processor: Any, sae: VisionSAE, scenes: Sequence[Scene]) -> list[ChangeMap]:
    images = [scene.image for scene in scenes]
    acts_btd = torch.cat(list(read_tokens(model, images, sae.hook_point, tokens="patches", processor=processor)))
    edits = {name: MergedEdit([ConceptEraser(model, sae, [name]).edit]) for name in ERASED}
    side = round(acts_btd.shape[1] ** 0.5)
    changes = {
        name: (edit(acts_btd) - acts_btd).norm(dim=-1).unflatten(1, (side, side)).detach().cpu().numpy()
        for name, edit in edits.items()
    }
    return [
        ChangeMap(scene.image, tuple(sorted(scene.concepts)), {name: change[i] for name, change in changes.items()})
        for i, scene in enumerate(scenes)
    ]


def _settings(sae: VisionSAE, eraser: ConceptEraser) -> dict[str, str]:
    place = sae.hook_point
    parameters = sum(p.numel() for p in eraser.model.parameters())
    gammas = eraser.edit.gammas
    per_concept = [f"{c.name}: k = {len(c.features)}, γ = {gammas[c.features[0]]:g}" for c in eraser.concepts]
    settings = {
        "Model": f"{type(eraser.model).__name__}, {parameters / 1e6:.1f} M parameters",
        "Hook point": f"{place.path}, block {place.layer + 1} of {place.n_layers}, width {place.d_in}",
        "Features and factor": "; ".join(per_concept).replace("-", "−"),
        "Reconstruction error": "kept" if eraser.edit.preserve_error else "not kept",
        "Tokens": f"edited: {sae.tokens.edit}; the SAE was trained on: {sae.tokens.read}",
        "SAE": f"{sae.sae.cfg.architecture()}, {sae.d_sae:,} features ({sae.d_sae // sae.d_in} × {sae.d_in})",
    }
    if sae.stats is not None:
        settings |= {
            "Explained variance": f"{100 * sae.stats.explained_variance:.1f}%",
            "L0": f"{sae.stats.l0:.1f} features fire on a token",
            "Dead features": f"{100 * sae.stats.dead_share:.1f}%",
        }
    return settings


# The terminal. --------------------------------------------------------------------------------------------------------

_BEFORE, _AFTER = ("same", "remembered", "forgotten", "lost", "gone"), ("same", "remembered", "new")
_STYLES = {
    "same": "not dim",
    "remembered": "not dim bold",
    "forgotten": "not dim bold red",
    "lost": "not dim yellow",
    "gone": "",
    "new": "not dim green",
}


def _print(page: DemoPage, path: Path, console: Console) -> None:
    erased = " and ".join(page.erased)
    console.print(f"\nBefore, and while {erased} are erased. The question: [italic]{escape(page.describe)}[/]\n")
    for card in page.cards:
        before, after = Text("  before  ", "dim"), Text("  erased  ", "dim")
        for piece in compare_words(card.before, card.after, page.erased, card.concepts):
            for line, changes in ((before, _BEFORE), (after, _AFTER)):
                if piece.change in changes:
                    line.append(piece.lead).append(piece.text, _STYLES[piece.change])
        console.print(before, after, sep="\n", end="\n\n")
    concepts = ", ".join(page.results.concepts)
    console.print(f"Each concept erased alone ({concepts}): mean in percent \\[95% interval]")
    table = Table()
    for heading in ("metric", "original", "erased", "kept"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    rows_of = metric_rows(page.results)
    for family in FAMILIES:
        table.add_row(Text(family, "italic"))
        for row in rows_of[family]:
            table.add_row(row.name, *map(_figure, (row.before, row.after)), f"{row.kept.value:.1f}" if row.kept else "")
        table.add_section()
    console.print(table)
    console.print("_d: asked yes or no; _g: named in descriptions. What each metric says, and more of them, is on the page.")
    console.print(f"\nThe page, with the images and the features: [bold]{escape(str(path))}[/]", soft_wrap=True)


def _figure(figure: Figure | None) -> str:
    return "–" if figure is None else escape(f"{figure.value:.1f} [{figure.low:.1f}, {figure.high:.1f}]")
