"""What a reader of the documentation is taken to have: names, folders of photos, and a hub with the models that are named.

Names and folders are made where a page uses them. The hub is transformers' own cache of downloads, in a temporary folder:
"llava-hf/llava-1.5-7b-hf" there is the bundled model, "openai/clip-vit-large-patch14-336" its tower with a text encoder.
"""

from __future__ import annotations

import ast
import copy
import importlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from documents import blocks, language, parse

LLAVA, CLIP = "llava-hf/llava-1.5-7b-hf", "openai/clip-vit-large-patch14-336"
N_PHOTOS = 8
"""Images in a folder."""


@cache
def world() -> tuple[Any, Any, Any]:
    """The bundled model, processor and SAE, loaded once; copies are handed out."""
    from sauce_hooks import scenes

    return scenes.load()


@cache
def drawn(n: int = N_PHOTOS, seed: int = 0, contains: Any = None, lacks: Any = None) -> list[Any]:
    """Scenes that the bundled model was not trained on."""
    from sauce_hooks import scenes

    return scenes.sample(n, seed=seed, contains=contains, lacks=lacks, split="test")


# The hub. -------------------------------------------------------------------------------------------------------------


def fill_hub(downloads: Path) -> None:
    """Put the models that the documentation names into a cache of downloads."""
    from sauce_hooks import scenes
    from sauce_hooks.scenes.dual import build_dual

    def snapshot(repo: str) -> Path:
        home, commit = downloads / f"models--{repo.replace('/', '--')}", "0" * 40
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text(commit)
        return home / "snapshots" / commit

    shutil.copytree(scenes.asset("model"), snapshot(LLAVA))
    model, processor, _ = world()
    folder = snapshot(CLIP)
    for part in build_dual(model, processor):
        part.save_pretrained(folder)


def use_hub(downloads: Path, uploads: Path, monkeypatch: Any) -> None:
    """Let transformers find its downloads in one folder, and what is uploaded go to another."""
    import huggingface_hub
    import transformers.utils.hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(downloads))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(downloads), raising=False)

    class Api:
        def create_repo(self, repo_id: str, **_: Any) -> str:
            (uploads / repo_id).mkdir(parents=True, exist_ok=True)
            return f"https://hub.test/{repo_id}"

        def file_exists(self, repo_id: str, filename: str) -> bool:
            return (uploads / repo_id / filename).is_file()

        def hf_hub_download(self, repo_id: str, filename: str) -> str:
            return str(uploads / repo_id / filename)

        def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> None:
            shutil.copytree(folder_path, uploads / repo_id, dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)


def answer_requests(monkeypatch: Any) -> None:
    """A judge at OpenAI's address, who says yes; any other address has nobody."""
    import requests

    def send(self: Any, request: Any, **_: Any) -> Any:
        assert request.url == "https://api.openai.com/v1/chat/completions", request.url
        answer = requests.Response()
        answer.status_code, answer.request, answer.url = 200, request, request.url
        answer._content = json.dumps({"choices": [{"message": {"content": "yes"}}], "usage": {}}).encode()
        return answer

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)


def _made(make: Callable[[Any], Any], fields: dict[str, Any], processor: Any) -> Any:
    attack = replace(make(processor), **fields)
    wordings = getattr(attack, "wordings", None)
    return replace(attack, wordings=dict(islice(wordings.items(), 2))) if isinstance(wordings, Mapping) else attack


def _few_settings(tuning: Any) -> Callable[..., Any]:
    return lambda *args, **more: tuning(*args, **{"ks": (2,), "gammas": (0.0, -1.0), **more})


def be_brief(monkeypatch: Any) -> None:
    """Few scenes for the command line to look at, small batches to train on: what is done with each stays what it is."""
    from sauce_hooks import cli
    from sauce_hooks.sae import training

    few = {"_ANSWERED": 4, "_BUNDLED_IMAGES": 16, "_CONCEPT_SCENES": 8, "_SIBLING_SCENES": 4}
    for name, n in few.items():
        monkeypatch.setattr(cli, name, n)
    small = {name: replace(preset, batch_size=16, expansion=4) for name, preset in training.PRESETS.items()}
    monkeypatch.setattr(training, "PRESETS", small)
    for name in ("distill", "baselines.training", "attacks.relearning"):
        module = importlib.import_module(f"sauce_hooks.evaluation.{name}")
        fit = module.fit
        monkeypatch.setattr(module, "fit", lambda *args, steps, fit=fit, **more: fit(*args, steps=min(steps, 3), **more))
    measure = importlib.import_module("sauce_hooks.evaluation.measure")
    monkeypatch.setattr(measure, "Tuning", _few_settings(measure.Tuning))
    attacks = importlib.import_module("sauce_hooks.evaluation.attacks.run")
    weaker: dict[str, dict[str, Any]] = {"adversarial images": {"steps": 2}, "relearning": {"lrs": (1e-3,)}}
    every = {name: partial(_made, make, weaker.get(name, {})) for name, make in attacks.ATTACKS.items()}
    monkeypatch.setattr(attacks, "ATTACKS", every)


# Folders. -------------------------------------------------------------------------------------------------------------


def _photos(folder: Path, seed: int = 0, n: int = N_PHOTOS, **kind: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, scene in enumerate(drawn(n, seed, **kind)):
        scene.image.save(folder / f"{i:02}.png")


def _concept_photos(folder: Path) -> None:
    """Of "tiger", images that hold it; of "not tiger", of "other" and of anything else, images that do not."""
    from sauce_hooks.scenes import CONCEPTS

    name = folder.name.removeprefix("not ")
    if folder.name.startswith("not "):
        return _photos(folder, 1, lacks=name)
    if name in CONCEPTS:
        return _photos(folder, 2, contains=name, lacks="tiger" if name == "cat" else None)
    return _photos(folder, 3, lacks="tiger")


def _labelled_photos(folder: Path) -> None:
    """A folder a domain, in each a folder a concept."""
    for domain, names in {"object": ("tiger", "cat", "car"), "color": ("red", "blue")}.items():
        for seed, name in enumerate(names):
            _photos(folder / domain / name, 10 + seed, 24, contains=name)


def _sae(folder: Path) -> None:
    from sauce_hooks import scenes

    shutil.copytree(scenes.asset("sae"), folder)


def _rows(folder: Path) -> None:
    """A cache of activations, as the page's own example says."""
    from sauce_hooks.activations import ActivationCache, CacheRecord, Chunk

    example = next(json.loads(str(region.parsed)) for region, _ in blocks("docs/cache.md") if language(region) == "json")
    cache = ActivationCache.open(folder, CacheRecord.from_dict(example["record"]), rows_per_shard=4)
    for i, size in enumerate([2, 2, 1]):
        cache.append(Chunk(torch.full((size, 3), float(i)), torch.arange(size) + 2 * i))
    cache.flush({"next": 3})


def _bank(file: Path) -> None:
    """The bank of the page's own example, and its tensors."""
    import hashlib

    from safetensors.torch import save

    text = next(str(region.parsed) for region, _ in blocks("docs/bank.md") if language(region) == "json")
    file.write_text(text, encoding="utf-8")
    raw = save({"0": torch.tensor([[0.6, 0.8]])})
    file.with_name(f"concepts-{hashlib.sha256(raw).hexdigest()[:16]}.safetensors").write_bytes(raw)


def _nli(folder: Path) -> None:
    from sauce_hooks.scenes.training import build_processor
    from test_judges_nli import tiny

    tiny().save_pretrained(folder)
    build_processor().tokenizer.save_pretrained(folder)


def _photo(file: Path) -> None:
    drawn(1, 5, contains="tiger")[0].image.save(file)


PLACES: tuple[tuple[str, Callable[[Path], None]], ...] = (
    (r"imagenet/train", lambda folder: _photos(folder, 20, 24)),
    (r"photos/[\w ]+/?", _concept_photos),
    (r"photos/?", lambda folder: None if any(folder.glob("*")) else _photos(folder, 4, 12)),
    (r"llava-sae", _sae),
    (r"imagenet-cache/manifest\.json", lambda file: _rows(file.parent)),
    (r"concepts\.json", _bank),
    (r"models/deberta-nli", _nli),
    (r"[\w-]+\.(png|jpg)", _photo),
)
"""What lies where a page says, by the path as it stands in a block; the first that matches."""
MADE = re.compile(r"""(?:out=["']|--out |save_pretrained\(["']|save\(["'])([\w/.-]+)""")
"""What a page writes itself does not lie there before, unless it reads it first."""
ALSO: Mapping[str, tuple[str, ...]] = {
    "docs/concepts.md": tuple(f"photos/{name}" for name in ("car", "not car", "boat", "not boat", "not tiger")),
}
"""Places that a page puts together in a loop."""


def _strings(source: str) -> list[str]:
    """The strings of a program; an f-string is not one, as what it says is not yet known."""
    nodes = list(ast.walk(ast.parse(source)))
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    return [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts
    ]


def _mentioned(page: str) -> list[str]:
    """Every word of the page's commands and every string of its Python."""
    words: list[str] = list(ALSO.get(page, ()))
    for region, _ in blocks(page):
        text = str(region.parsed)
        words += {"python": _strings, "sh": str.split}.get(language(region) or "", lambda _: [])(text)
    return words


def furnish(page: str, home: Path) -> None:
    """Make the folders and files that the page's blocks read."""
    text = "\n".join(str(region.parsed) for region, _ in blocks(page))
    made = {found.rstrip("/") for found in MADE.findall(text)}
    if "from_folder(" in text:
        _labelled_photos(home / "photos")
    for word in sorted(set(_mentioned(page)), key=len, reverse=True):
        path = home / word
        if word.rstrip("/") in made or (path.exists() and word != "photos"):
            continue
        make = next((make for pattern, make in PLACES if re.fullmatch(pattern, word)), None)
        if make is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path)


# Names. ---------------------------------------------------------------------------------------------------------------


class Reader:
    """Somebody who has read so far; each property is a name that blocks may use without having made it."""

    def __init__(self, home: Path) -> None:
        self.home = home

    @cached_property
    def sauce_hooks(self) -> Any:
        """The library."""
        import sauce_hooks

        return sauce_hooks

    sh = property(lambda self: self.sauce_hooks)
    ConceptEraser = property(lambda self: self.sauce_hooks.ConceptEraser)

    @cached_property
    def model(self) -> Any:
        """A copy of the bundled one, which may be spoiled."""
        return copy.deepcopy(world()[0])

    llava = property(lambda self: self.model)

    @cached_property
    def processor(self) -> Any:
        """Its processor."""
        return copy.deepcopy(world()[1])

    @cached_property
    def sae(self) -> Any:
        """Its SAE with the bank."""
        return copy.deepcopy(world()[2])

    vision_sae = property(lambda self: self.sae)
    tower_sae = property(lambda self: self.sae)

    @cached_property
    def projector_sae(self) -> Any:
        """An SAE of the projector's output, its weights random."""
        from sauce_hooks import Concept, ConceptBank, VisionSAE, find_hook_point
        from tiny import make_sae

        place = find_hook_point(self.model, "model.multi_modal_projector")
        sae = VisionSAE.wrap(make_sae(d_in=place.d_in), place, model=self.model)
        sae.concepts = ConceptBank([Concept("red", (1, 2, 3))])
        return sae

    @cached_property
    def eraser(self) -> Any:
        """One that is off."""
        return self.ConceptEraser(self.model, self.sae, ["tiger"])

    @cached_property
    def prompt(self) -> str:
        """A question."""
        return self.sauce_hooks.scenes.describe_prompt()

    @cached_property
    def pictures(self) -> list[Any]:
        """Images, as PIL has them; every other one holds a tiger."""
        return [scene.image for scene in self._scenes]

    @cached_property
    def _scenes(self) -> list[Any]:
        pairs = zip(drawn(16, 6, contains="tiger"), drawn(16, 7, lacks="tiger"), strict=True)
        return [scene for pair in pairs for scene in pair]

    images = property(lambda self: self.pictures)

    @cached_property
    def labels(self) -> list[list[str]]:
        """The concepts in each image of the folder "photos", by the folders in it; where there is none, in `images`."""
        from sauce_hooks.scenes import CONCEPTS

        photos = sorted((self.home / "photos").rglob("*.png"))
        if photos:
            return [[photo.parent.name] if photo.parent.name in CONCEPTS else [] for photo in photos]
        return [sorted(scene.concepts) for scene in self._scenes]

    @cached_property
    def inputs(self) -> Any:
        """A question about one image."""
        return self.processor(images=drawn(1, 5, contains="tiger")[0].image, text=self.prompt, return_tensors="pt")

    @cached_property
    def probes(self) -> Any:
        """A protocol's images, very few."""
        return self.sauce_hooks.scenes.probes(2, retained=1, negatives=2)

    @cached_property
    def other_probes(self) -> Any:
        """Other ones."""
        return self.sauce_hooks.scenes.probes(8, retained=1, negatives=8, split="val")

    others = property(lambda self: self.other_probes)

    @cached_property
    def contrast_sets(self) -> Any:
        """Of a concept, images with it and without."""
        return lambda concept: tuple(
            [s.image for s in drawn(contains=c, lacks=n)] for c, n in ((concept, None), (None, concept))
        )

    @cached_property
    def forget_retain_sets(self) -> Any:
        """Of a concept, what weight-updating methods are trained on."""
        from sauce_hooks.scenes.rivals import data

        return lambda concept: data(concept, 8)

    @cached_property
    def nm(self) -> Any:
        """The model in nnsight's hands."""
        from nnsight import NNsight

        return NNsight(self.model)


def names(page: str, home: Path) -> dict[str, Any]:
    """Those of a reader's names that the page's blocks use."""
    used = {
        node.id
        for region, _ in blocks(page)
        if language(region) == "python"
        for node in ast.walk(ast.parse(str(region.parsed)))
        if isinstance(node, ast.Name)
    }
    reader = Reader(home)
    return {name: getattr(reader, name) for name in sorted(used) if not name.startswith("_") and hasattr(Reader, name)}


def _anew(page: str, home: Path) -> None:
    for path in home.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    furnish(page, home)


def run(page: str, home: Path) -> None:
    """Run a page's blocks, in order, in `home`."""
    document = parse(page)
    furnish(page, home)
    document.anew = lambda: _anew(page, home)  # type: ignore[attr-defined]
    document.namespace.update(names(page, home))
    for example in document:
        example.evaluate()
