"""The command line: one command a verb, a thin call of the public API. Heavy imports wait until they are needed."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sauce_hooks.errors import SauceHooksError, UnknownConceptError

_KEPT = "what is finished is kept: the same command goes on from there"
_INTERRUPTED = {"frontier": _KEPT, "reproduce": _KEPT, "train-sae": "nothing new is saved"}
"""What Ctrl-C leaves, by verb. Others write at their end, whole or not at all."""


class _Verbs(TyperGroup):
    """Turns the errors a user can meet into a message, and Ctrl-C into its usual exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except SauceHooksError as error:
            typer.secho(f"{type(error).__name__}: {error}", err=True, fg="red")
            raise typer.Exit(1) from None
        except BrokenPipeError:
            raise
        except OSError as error:  # a full disk, a folder that may not be written to
            typer.secho(str(error), err=True, fg="red")
            raise typer.Exit(1) from None
        except ImportError as error:
            if "sauce-hooks[" not in str(error):  # an extra that is not installed, and how to install it
                raise
            typer.secho(str(error), err=True, fg="red")
            raise typer.Exit(1) from None
        except KeyboardInterrupt as interrupt:
            left = _INTERRUPTED.get(ctx.invoked_subcommand, "")
            if ctx.invoked_subcommand == "train-sae" and str(interrupt):
                left = f"{interrupt}: the same command with --resume goes on from there"
            typer.echo("\ninterrupted" + (f"; {left}" if left else ""), err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Make a vision-language model forget named concepts while it runs, without touching its weights.",
    epilog="Exit codes: 0 done; 1 it could not be done, and why is said; 2 the command was not understood; 130 interrupted "
    "(long runs go on where they were, called again with the same folder). Results go to stdout, all else to stderr; with "
    "--json stdout is one JSON document.",
)
SEE, MAKE, MEASURE = "See it", "On your own model", "Measure"
"""The parts of the table of contents, in this order."""


def _version(wanted: bool) -> bool:
    if wanted:
        from sauce_hooks import __version__

        typer.echo(__version__)
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version


ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A folder, an id on the Hugging Face hub, or the word *bundled*."),
]
SAEArgument = Annotated[
    Path, typer.Argument(metavar="SAE", exists=True, file_okay=False, help="The folder that `train-sae` wrote.")
]
ImagesHelp = "A folder of images, or one image."
JSONOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs to read.")]
PRESETS = ("sauce", "batchtopk", "matryoshka", "topk", "jumprelu", "gated", "matching_pursuit")
EXPERIMENTS = ("table2", "table4", "figure6", "figure7")
"""Names that the shell completes; written out here, as completing must not import torch."""


def _begins(names: Sequence[str]) -> Callable[[str], list[str]]:
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def _say(as_json: bool, record: dict[str, Any], text: str) -> None:
    """For programs, or for people."""
    if as_json:
        _print_json(record)
    else:
        typer.echo(text)


def _print_json(record: dict[str, Any]) -> None:
    typer.echo(json.dumps(_plain(record), ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    """JSON has no NaN: what could not be measured is null."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _aside(as_json: bool) -> AbstractContextManager[Any]:
    """Where programs read stdout, what is printed meanwhile goes to stderr."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def _bundled_concepts(names: Sequence[str] | None) -> list[str] | None:
    """Concepts to erase, each once; a wrong one is refused before anything is measured."""
    from sauce_hooks.scenes import CONCEPTS

    for name in names or ():
        if name not in CONCEPTS:
            raise UnknownConceptError(name, CONCEPTS)
    return list(dict.fromkeys(names)) if names else None


@app.command(rich_help_panel=SEE)
def demo(
    out: Annotated[Path, typer.Option(dir_okay=False, help="Where to write the page.")] = Path("sauce_hooks_demo.html"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer images and concepts: half a minute.")] = False,
) -> None:
    """See the bundled model forget "red" and "tiger".

    Answers, numbers, and an HTML page, in a minute or two.

    Example: `sauce-hooks demo --out forget.html`
    """
    from sauce_hooks.scenes.demo import run

    run(out, quick=quick)


@app.command(rich_help_panel=SEE)
def ask(
    model: ModelArgument,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", exists=True, dir_okay=False, help="The picture.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The question about the image.")],
    sae: Annotated[str | None, typer.Option(help="The SAE's folder or hub id; the bundled model brings its own.")] = None,
    erase: Annotated[list[str] | None, typer.Option(help="A concept to erase; repeat for several.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 64,
    as_json: JSONOption = False,
) -> None:
    """Ask a model about an image, before and while it forgets.

    Example: `sauce-hooks ask bundled photo.png "describe this picture." --erase red --erase tiger`
    """
    from sauce_hooks.activations import iter_images
    from sauce_hooks.erasure import ConceptEraser
    from sauce_hooks.evaluation import chat_prompt
    from sauce_hooks.sae import VisionSAE
    from sauce_hooks.scenes import asset

    if sae is None and erase and model != "bundled":
        raise typer.BadParameter("to erase a concept, say which SAE knows it", param_hint="--sae")
    with _aside(as_json):
        vision_sae = VisionSAE.load(sae or asset("sae")) if erase else None
        for name in erase or ():
            assert vision_sae is not None
            vision_sae.concepts[name]  # an unknown one is refused before a model is loaded
        picture = next(iter_images(image))
        network, processor = _load(model)
        eraser = ConceptEraser(network, vision_sae, erase) if vision_sae is not None and erase else None
        inputs = processor(images=picture, text=chat_prompt(processor, prompt), return_tensors="pt")
        inputs = inputs.to(network.device, dtype=network.dtype)

        def answer() -> str:
            output = network.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
            return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

        answers = {"before": answer()}
        if eraser is not None:
            with eraser:
                answers["erased"] = answer()
    _say(as_json, answers, "\n".join(f"{when + ':':<7} {said}" for when, said in answers.items()))


@app.command("hook-point", rich_help_panel=MAKE)
def hook_point(
    model: ModelArgument,
    layer: Annotated[
        str | None,
        typer.Option(
            help="-1 is the last block of the vision tower, -2 the one before; or a dotted path. The best by default."
        ),
    ] = None,
    as_json: JSONOption = False,
) -> None:
    """Show where in a model concepts would be erased.

    Reads the model's configuration, not its weights.

    Example: `sauce-hooks hook-point llava-hf/llava-1.5-7b-hf`
    """
    from sauce_hooks.hookpoint import find_hook_point, tokens_per_image

    with _aside(as_json):
        skeleton = _skeleton(model)
        place = find_hook_point(skeleton, int(layer) if layer and layer.lstrip("+-").isdecimal() else layer)
    facts = {
        "family": place.family,
        "path": place.path,
        "block": f"{place.layer + 1} of {place.n_layers}; read: {', '.join(str(i + 1) for i in place.reads)}",
        "width": place.d_in,
        "tokens": f"{tokens_per_image(skeleton, place, 'patches') or 'any number of'} patches an image",
        "class token": place.layout.class_token,
    }
    _say(as_json, place.to_dict(), "\n".join(f"{name:<12} {fact}" for name, fact in facts.items()))


@app.command("train-sae", rich_help_panel=MAKE)
def train_sae(
    model: ModelArgument,
    images: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES",
            help="A folder of images or of WebDataset shards, a pattern like *shards/{000..099}.tar*, or the id of a "
            "Hugging Face dataset.",
        ),
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="The folder to save the SAE to.")],
    preset: Annotated[
        str,
        typer.Option(
            help="*sauce*: the paper's; *batchtopk*: a better modern one; to compare with it: *matryoshka*, *topk*, "
            "*jumprelu*, *gated*, *matching_pursuit*.",
            autocompletion=_begins(PRESETS),
        ),
    ] = "sauce",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the folder.")] = False,
    cache: Annotated[
        Path | None, typer.Option(file_okay=False, help="A folder to keep activations in, for the later epochs.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of a Hugging Face dataset.")] = "train",
    n_images: Annotated[int | None, typer.Option(min=1, help="Use so many images; needed for shards and streams.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the images; the preset's by default.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that decode images.")] = None,
    image_batch_size: Annotated[int, typer.Option(min=1, help="Images a forward of the tower.")] = 64,
    log_to: Annotated[
        list[str] | None,
        typer.Option(help="*tensorboard* or *wandb*; repeat for both.", autocompletion=_begins(("tensorboard", "wandb"))),
    ] = None,
    as_json: JSONOption = False,
) -> None:
    """Train a sparse autoencoder on a model's vision tower.

    It reads one block of the tower; `hook-point` says which. Ctrl-C saves: the same command with `--resume` goes on.

    Over several processes: `torchrun --nproc-per-node 8 -m sauce_hooks train-sae ...`, or `accelerate launch`.

    Example: `sauce-hooks train-sae llava-hf/llava-1.5-7b-hf photos/ --out llava-sae --preset batchtopk`
    """
    if preset not in PRESETS:
        raise typer.BadParameter(f"{preset!r} is none of {', '.join(PRESETS)}", param_hint="--preset")
    changes: dict[str, Any] = {} if epochs is None else {"epochs": epochs}
    with _aside(as_json):
        from sauce_hooks.sae import train_sae as train

        data = _images(images, split)
        network, processor = _load(model)
        sae = train(
            network,
            data,
            processor=processor,
            preset=preset,
            out=out,
            resume=resume,
            cache=cache,
            n_images=n_images,
            workers=workers,
            image_batch_size=image_batch_size,
            log_to=log_to or (),
            **changes,
        )
    if sae.stats is not None:
        typer.echo(f"explained variance {sae.stats.explained_variance:.3f}, L0 {sae.stats.l0:.1f}", err=True)
    facts = {} if sae.stats is None else {"explained_variance": sae.stats.explained_variance, "l0": sae.stats.l0}
    _say(as_json, {"out": str(out), **facts}, str(out))


@app.command(rich_help_panel=MAKE)
def features(
    sae: Annotated[
        str, typer.Argument(metavar="SAE", help="A folder that `train-sae` wrote, a hub id, or the word *bundled*.")
    ],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model it belongs to, to measure its features on `--images`.")
    ] = None,
    images: Annotated[Path | None, typer.Option(metavar="IMAGES", exists=True, help=ImagesHelp)] = None,
    out: Annotated[Path, typer.Option(dir_okay=False, help="Where to write the page.")] = Path("features.html"),
    as_json: JSONOption = False,
) -> None:
    """Look at what an SAE's features mean, on one HTML page.

    Numbers, plots and each feature's top images. With `--model` and `--images` it measures, and the SAE's folder remembers;
    without, the page shows what the folder holds.

    Example: `sauce-hooks features llava-sae --model llava-hf/llava-1.5-7b-hf --images photos/ --out features.html`
    """
    from sauce_hooks.report import write_features
    from sauce_hooks.sae import VisionSAE
    from sauce_hooks.scenes import asset

    bundled = sae == "bundled"
    if (model is None) != (images is None) and not bundled:
        missing = "--images" if images is None else "--model"
        raise typer.BadParameter("measuring takes both a model and images: one of them is missing", param_hint=missing)
    with _aside(as_json):
        vision_sae = VisionSAE.load(asset("sae") if bundled else sae)
        if model is not None or bundled:
            _describe(vision_sae, model or "bundled", images)
            if Path(sae).is_dir() and not bundled:
                vision_sae.save(sae)
        if vision_sae.stats is None:
            raise typer.BadParameter(
                f"{sae} holds nothing about its features yet: add --model MODEL --images IMAGES to measure them",
                param_hint="SAE",
            )
        page = write_features(vision_sae, out, sae)
    stats = vision_sae.stats
    facts = {"explained_variance": stats.explained_variance, "l0": stats.l0, "dead_share": stats.dead_share}
    _say(as_json, {"page": str(page), "features": vision_sae.d_sae, **facts}, str(page))


@app.command(rich_help_panel=MAKE)
def learn(
    model: ModelArgument,
    sae: SAEArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to call the concept.")],
    positives: Annotated[Path, typer.Argument(metavar="POSITIVES", exists=True, help="Images that show it.")],
    negatives: Annotated[Path, typer.Argument(metavar="NEGATIVES", exists=True, help="Images that do not.")],
    k: Annotated[int | None, typer.Option(min=1, help="How many features at the most.")] = None,
    gamma: Annotated[float | None, typer.Option(help="The factor the concept's features get when it is erased.")] = None,
    sibling: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=IMAGES", help="Images of another concept of its domain, to be kept; repeat for several."),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Ask the model, and find how many features, how strongly, and where to write.")
    ] = False,
    as_json: JSONOption = False,
) -> None:
    """Learn a concept from images with it and images without.

    The SAE's folder remembers it.

    Example: `sauce-hooks learn ./llava llava-sae tiger photos/tiger photos/other --sibling cat=photos/cat --tune`
    """
    from sauce_hooks.concepts import learn_concept
    from sauce_hooks.evaluation import tune_concept
    from sauce_hooks.sae import VisionSAE
    from sauce_hooks.scenes.probes import wording

    if tune and (k is not None or gamma is not None):
        raise typer.BadParameter("--tune finds the number of features and gamma: leave out --k and --gamma")
    siblings = dict(map(_sibling, sibling or ()))
    with _aside(as_json):
        vision_sae = VisionSAE.load(sae)
        network, processor = _load(model)
        options: dict[str, Any] = {"processor": processor, "siblings": siblings or None}
        if tune:
            words = wording() if model == "bundled" else None
            concept = tune_concept(network, vision_sae, name, positives, negatives, wording=words, **options)
        else:
            concept = learn_concept(network, vision_sae, name, positives, negatives, k=k, gamma=gamma, **options)
        vision_sae.save(sae)
    best = ", ".join(f"{f} ({s:.3g})" for f, s in list(zip(concept.features, concept.scores, strict=True))[:5])
    text = f"{name}: {len(concept.features)} features, best {best}"
    if concept.effect is not None:
        figures = concept.effect.figures
        found = ", ".join(f"{metric} {100 * rate.value:.0f}%" for metric, rate in figures.items())
        text += f"\ngamma {concept.gamma:g}, written {concept.provenance['written']}: {found} ({concept.effect.images})"
    _say(as_json, _record(concept), text)


def _record(concept: Any) -> dict[str, Any]:
    """A concept, for programs."""
    record = {"name": concept.name, "features": concept.features, "scores": concept.scores, "gamma": concept.gamma}
    if concept.effect is not None:
        record["effect"] = {metric: rate.value for metric, rate in concept.effect.figures.items()}
    return record


def _sibling(given: str) -> tuple[str, Path]:
    name, found, images = given.partition("=")
    if not (name and found and Path(images).exists()):
        raise typer.BadParameter(f"{given!r} is not NAME=IMAGES with images that exist", param_hint="--sibling")
    return name, Path(images)


concept_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Look at a concept, on one HTML page.")
app.add_typer(concept_app, name="concept", rich_help_panel=MAKE)


@concept_app.command("show")
def concept_show(
    sae: Annotated[
        str, typer.Argument(metavar="SAE", help="A folder that `train-sae` wrote, a hub id, or the word *bundled*.")
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="A concept of its bank.")],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model it belongs to, to look at images with.")
    ] = None,
    positives: Annotated[Path | None, typer.Option(exists=True, help="Images that show the concept.")] = None,
    negatives: Annotated[Path | None, typer.Option(exists=True, help="Images that do not.")] = None,
    out: Annotated[Path, typer.Option(dir_okay=False, help="Where to write the page.")] = Path("concept.html"),
    as_json: JSONOption = False,
) -> None:
    """Look at a concept, on one HTML page.

    What its features fire on, what erasing it writes and does, and what is near.

    Without images the page shows what the bank and the SAE's folder know. The bundled SAE brings its own images.

    Example: `sauce-hooks concept show bundled tiger --out tiger.html`
    """
    from sauce_hooks.report.concept import write_concept
    from sauce_hooks.report.concept_data import look
    from sauce_hooks.sae import VisionSAE
    from sauce_hooks.scenes import asset

    bundled = sae == "bundled"
    given = {"--model": model or (sae if bundled else None), "--positives": positives, "--negatives": negatives}
    missing = [option for option, value in given.items() if value is None]
    own_images = bundled and positives is None and negatives is None
    if missing and not own_images and len(missing) < len(given):
        raise typer.BadParameter(
            "looking at images takes a model, images with the concept and images without: one is missing",
            param_hint=missing[0],
        )
    with _aside(as_json):
        vision_sae = VisionSAE.load(asset("sae") if bundled else sae)
        concept = vision_sae.concepts[name]  # an unknown one is refused before a model is loaded
        evidence = None
        if own_images or not missing:
            network, processor = _load(model or "bundled")
            vision_sae.sae.to(network.device)
            sets: dict[str, Any] = {"positives": positives, "negatives": negatives}
            if own_images:
                sets = _concept_scenes(vision_sae, name)
            evidence = look(network, vision_sae, concept, processor=processor, **sets)
        page = write_concept(vision_sae, concept, out, evidence, sae_name=sae)
    _say(as_json, {"page": str(page), **_record(concept)}, str(page))


@app.command(rich_help_panel=MEASURE)
def table(
    out: Annotated[Path, typer.Option(file_okay=False, help="The folder for the results.")] = Path("table"),
    n: Annotated[int, typer.Option(min=1, help="Test images that hold each concept, and as many that lack it.")] = 50,
    retained: Annotated[int, typer.Option(min=1, help="Images of each retained concept.")] = 10,
    concepts: Annotated[
        list[str] | None, typer.Option("--concepts", help="A concept to erase; repeat for several. All by default.")
    ] = None,
    as_json: JSONOption = False,
) -> None:
    """Erase every concept of the bundled world, by several methods.

    Prints and writes what is forgotten and what is kept, side by side. About 15 minutes on two cores.

    Example: `sauce-hooks table --out runs/table --concepts red --concepts tiger`
    """
    erased = _bundled_concepts(concepts)
    with _aside(as_json):
        from sauce_hooks.scenes.table import run

        results = run(out, n, retained, erased)
    if as_json:
        _print_json({"out": str(out), "results": results.to_frame().to_dict("records")})


@app.command(rich_help_panel=MEASURE)
def frontier(
    out: Annotated[
        Path, typer.Option(file_okay=False, help="The folder for the results; a half-finished run goes on.")
    ] = Path("frontier"),
    jobs: Annotated[int, typer.Option(min=1, help="Processes, of one core each.")] = 2,
    concepts: Annotated[
        list[str] | None, typer.Option("--concepts", help="A concept to erase; repeat for several. All by default.")
    ] = None,
    as_json: JSONOption = False,
) -> None:
    """Compare scores and edits at equal retention.

    Every score with every edit, on the bundled world. About an hour on two cores.

    Example: `sauce-hooks frontier --out runs/frontier --concepts car --concepts stone`
    """
    erased = _bundled_concepts(concepts)
    with _aside(as_json):
        from sauce_hooks.scenes.frontier import run

        found = run(out, jobs, erased)
    if as_json:
        _print_json({"out": str(out), "cells": found})


@app.command(rich_help_panel=MEASURE)
def reproduce(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="*table2*, *table4*, *figure6*, *figure7* or *all*.",
            autocompletion=_begins((*EXPERIMENTS, "all")),
        ),
    ],
    out: Annotated[
        Path, typer.Option(file_okay=False, help="The folder for the results; a half-finished run goes on.")
    ] = Path("reproduction"),
    config: Annotated[
        str | None,
        typer.Option(
            help="A model at the paper's scale: *llava-1.5-7b*, *llama-3.2-11b-vision*, *smolvlm-256m*, or a file. "
            "Its SAE is trained and its concepts are learnt first, where that is not done."
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, of one core each; 1 with `--config`.")] = 2,
    as_json: JSONOption = False,
) -> None:
    """Make the paper's tables and figures anew, claim by claim.

    *all* takes about half an hour on two cores. Writes a CSV, a Markdown file and a picture of each, and one HTML page.
    Over several processes or GPUs: `accelerate launch -m sauce_hooks reproduce ...`.

    Example: `sauce-hooks reproduce figure6 --out runs/paper`
    """
    from dataclasses import asdict
    from functools import partial

    if what not in (*EXPERIMENTS, "all"):
        raise typer.BadParameter(f"{what!r} is none of {', '.join(EXPERIMENTS)}, all", param_hint="WHAT")
    with _aside(as_json):
        from sauce_hooks.reproduce import bundled_study
        from sauce_hooks.reproduce import reproduce as run

        make: Any = partial(bundled_study, out / "weights")
        if config is not None:
            from sauce_hooks.reproduce.paper import paper, prepare

            prepare(config, out)
            make = paper(config, out)
        findings = run(make, out, EXPERIMENTS if what == "all" else (what,), jobs=jobs if config is None else 1)
    if as_json:
        claims = [{**asdict(claim), "outcome": claim.outcome} for finding in findings for claim in finding.claims]
        _print_json({"out": str(out), "claims": claims})


def _images(images: str, split: str) -> Any:
    """What the word for some images means: a path, shards, or a dataset on the hub, which is streamed."""
    if Path(images).exists() or images.endswith((".tar", "}")):
        return images
    from datasets import load_dataset

    try:
        return load_dataset(images, split=split, streaming=True)
    except (OSError, ValueError) as problem:
        message = f"{images!r} is no folder, no shards and no dataset that can be loaded: {problem}"
        raise typer.BadParameter(message, param_hint="IMAGES") from problem


_ANSWERED, _BUNDLED_IMAGES = 48, 1_000
"""Images whose answers the loss added is measured on, and scenes that show the bundled features."""


def _describe(sae: Any, model: str, images: Path | None) -> None:
    """Measure features on images (scenes of the bundled world if there are none), and the loss added on some of them."""
    from itertools import islice

    from sauce_hooks.activations import iter_images
    from sauce_hooks.evaluation import Answered, chat_prompt, describe_sae, own_answers
    from sauce_hooks.scenes import describe_prompt, sample

    network, processor = _load(model)
    sae.sae.to(network.device)
    if images is None:
        scenes = sample(_BUNDLED_IMAGES, seed=700_000)
        pictures, answers = [scene.image for scene in scenes], "true"
        some = zip(scenes[:_ANSWERED], pictures, strict=False)
        answered = [Answered(picture, describe_prompt(), scene.caption) for scene, picture in some]
    elif network.config.is_encoder_decoder:
        typer.echo("the loss added is not measured: it takes a decoder-only language model", err=True)
        pictures, answers, answered = images, "given", []
    else:
        pictures, answers = images, "the model's own"
        question = describe_prompt() if model == "bundled" else chat_prompt(processor, "Describe this image.")
        answered = own_answers(network, list(islice(iter_images(images), _ANSWERED)), question, processor)
    describe_sae(network, sae, pictures, processor=processor, answered=answered, answers=answers)


_CONCEPT_SCENES, _SIBLING_SCENES = 100, 40
"""Scenes with a concept, as many without it, and of each sibling, that show a bundled concept."""


def _concept_scenes(sae: Any, name: str) -> dict[str, Any]:
    """Validation scenes of the bundled world for a concept's page: nobody has learnt features or trained a model on them."""
    from sauce_hooks.report.concept_data import siblings_of
    from sauce_hooks.scenes import DOMAINS, domain_of, sample

    def images(n: int, seed: int, **kind: Any) -> list[Any]:
        return [scene.image for scene in sample(n, seed=seed, split="val", **kind)]

    sharing = [sibling.name for sibling in siblings_of(sae, sae.concepts[name]) if sibling.shared]
    near = dict.fromkeys((*(other for other in DOMAINS[domain_of(name)] if other != name), *sharing))
    return {
        "positives": images(_CONCEPT_SCENES, 800_000, contains=name),
        "negatives": images(_CONCEPT_SCENES, 800_001, lacks=name),
        "siblings": {
            other: images(_SIBLING_SCENES, 800_002 + i, contains=other, lacks=name) for i, other in enumerate(near)
        },
        "source": "validation scenes of the bundled world, which nothing was trained or selected on except how many "
        "features and how strongly",
    }


def _load(model: str) -> tuple[Any, Any]:
    """A model, on this process's GPU if there is one, and its processor."""
    if model == "bundled":
        from sauce_hooks.scenes import load_model

        return load_model()
    import torch
    from accelerate import PartialState
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(model)
        network: Any = AutoModelForImageTextToText.from_pretrained(model, dtype="auto")
    except (OSError, ValueError, ImportError) as problem:
        raise _not_loaded(model, problem) from problem
    return network.eval().to(PartialState(cpu=not torch.cuda.is_available()).device), processor


def _skeleton(model: str) -> Any:
    """A model without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    if model == "bundled":
        from sauce_hooks.scenes import asset

        model = str(asset("model"))
    try:
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)
    except (OSError, ValueError) as problem:
        raise _not_loaded(model, problem) from problem


def _not_loaded(model: str, problem: Exception) -> typer.BadParameter:
    reason = " ".join(str(problem).split())
    if Path(model).is_dir():
        message = f"the folder {model!r} holds no vision-language model that can be loaded: {reason}"
    else:
        message = f"{model!r} is no folder here, and no vision-language model that the hub gives: {reason}"
    return typer.BadParameter(message, param_hint="MODEL")


def main() -> None:
    """The command line; `sauce_hooks.__main__` is where it is entered."""
    if not sys.stderr.isatty():  # transformers' bars are redrawn, and fill a log
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    app(prog_name="sauce-hooks")  # under `python -m` too: completion and hints name the command
