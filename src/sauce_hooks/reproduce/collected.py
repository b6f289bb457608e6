"""The images of an experiment: looked for once, written down by their digests, and the same ever after.

Objects come from a dataset with ImageNet's classes, all else from a folder for each concept. The dataset's own test split
is reported on; images from folders are split by their digests, as everywhere in `evaluation.labelled`: about four fifths to
learn from (a quarter of these for validation), one fifth to report on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from sauce_hooks.activations.sources import Sized, find_source
from sauce_hooks.bank.files import write_text_atomically
from sauce_hooks.errors import ConfigError, ImagesError, ResumeError
from sauce_hooks.evaluation.labelled import FilePicture, Labelled, LabelledImages, RowPicture, Split
from sauce_hooks.evaluation.probes import Probe, ProbeSet, Wording
from sauce_hooks.reproduce.config import Domain, Objects, Protocol, Synsets

Part = Literal["training", "test"]
_VALIDATION = 0.25
"""Of a dataset's training images, as of a folder's."""
_SHOWN = 6


@dataclass(frozen=True)
class Used:
    """One image: where it is, and what its labels say."""

    digest: str
    concepts: tuple[str, ...]
    split: Split
    file: str | None = None
    part: Part | None = None
    """Of the dataset of objects, if it is a row of that."""
    row: int = 0


@dataclass(frozen=True)
class Collection:
    """All of them, and the concepts that have too few."""

    images: tuple[Used, ...]
    left_out: Mapping[str, str]
    """Why, by concept."""

    def save(self, path: Path) -> None:
        """Write JSON; whole or not at all."""
        content = {"left_out": dict(self.left_out), "images": [asdict(image) for image in self.images]}
        write_text_atomically(path, json.dumps(content, indent=0))

    @classmethod
    def load(cls, path: Path) -> Collection:
        """Read it; `ResumeError` if it is damaged."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            images = (Used(**{**image, "concepts": tuple(image["concepts"])}) for image in content["images"])
            return cls(tuple(images), dict(content["left_out"]))
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise ResumeError(f"{path} is no list of images ({problem!r}): remove it to have it made anew") from problem


def collect(protocol: Protocol) -> Collection:
    """Look for the images of every concept.

    Raises:
        ConfigError: no folder of images, or a dataset that cannot be read or has other classes.
        ImagesError: no concept of a task has enough images; says what each has, and where it looked.
    """
    wanted = protocol.images
    if wanted.folder is not None and not Path(wanted.folder).is_dir():
        raise ConfigError(
            f"images.folder: no folder {Path(wanted.folder).absolute()}. Make it, with the images of each concept in "
            f"DOMAIN/CONCEPT/, such as {_example(protocol)}; or name another in the configuration"
        )
    found: dict[str, Used] = {}
    looked: dict[str, str] = {}
    for domain in protocol.domains:
        images = _in_dataset(protocol, domain) if domain.imagenet else _in_folder(Path(str(wanted.folder)), domain)
        place = str(protocol.objects and protocol.objects.dataset) if domain.imagenet else _place(protocol, domain)
        looked.update(dict.fromkeys(domain.concepts, place))
        for image in images:  # an image that is met twice has all its labels; if it is a test image once, it is one
            same = found.get(image.digest)
            if same is not None:
                split = "test" if "test" in (same.split, image.split) else same.split
                image = replace(same, concepts=tuple(sorted({*same.concepts, *image.concepts})), split=split)
            found[image.digest] = image
    kept: dict[str, Used] = {}
    left_out: dict[str, str] = {}
    ordered = sorted(found.values(), key=lambda image: image.digest[::-1])  # its beginning decides the split
    for concept in (concept for domain in protocol.domains for concept in domain.concepts):
        own = [image for image in ordered if concept in image.concepts]
        parts = [image for image in own if image.split != "test"], [image for image in own if image.split == "test"]
        if min(map(len, parts)) < wanted.least:
            left_out[concept] = (
                f"{len(parts[0])} training and {len(parts[1])} test images in {looked[concept]}; images.least asks for "
                f"{wanted.least} of each"
            )
        else:
            kept.update((image.digest, image) for image in (*parts[0][: wanted.training], *parts[1][: wanted.test]))
    _require(protocol, left_out)
    return Collection(tuple(kept[digest] for digest in sorted(kept)), left_out)


def _require(protocol: Protocol, left_out: Mapping[str, str]) -> None:
    """`ImagesError` if a task has no concept left."""
    for task in dict.fromkeys(domain.task for domain in protocol.domains):
        concepts = [concept for domain in protocol.domains if domain.task == task for concept in domain.concepts]
        if all(concept in left_out for concept in concepts):
            reasons = [f"{concept}: {left_out[concept]}" for concept in concepts]
            more = f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
            raise ImagesError(
                f"no {task} concept has enough images. {'; '.join(reasons[:_SHOWN])}{more}. Add images, ask for fewer "
                "(images.least), or take the domain out of the table of concepts"
            )


def _example(protocol: Protocol) -> str:
    domain = next((one for one in protocol.domains if not one.imagenet), protocol.domains[0])
    return f"{protocol.images.folder}/{domain.name}/{domain.concepts[0]}/*.jpg"


def _place(protocol: Protocol, domain: Domain) -> str:
    return str(Path(str(protocol.images.folder), domain.name).absolute())


def _in_folder(root: Path, domain: Domain) -> Iterator[Used]:
    """Images in FOLDER/DOMAIN/CONCEPT. Folders of other names are passed over."""
    folder = root / domain.name
    if not folder.is_dir() or not any(path.is_dir() for path in folder.iterdir()):
        return
    for image in LabelledImages.from_folder(folder).images:
        concepts = tuple(sorted(image.concepts & set(domain.concepts)))
        if concepts and isinstance(image.picture, FilePicture):
            yield Used(image.picture.name, concepts, image.split, str(Path(image.picture.path).absolute()))


def _in_dataset(protocol: Protocol, domain: Domain) -> Iterator[Used]:
    """Rows with the classes of a domain's concepts, from all over the dataset."""
    import numpy as np

    objects, wanted = protocol.objects, protocol.images
    assert objects is not None
    parts: tuple[tuple[Part, str, int], ...] = (
        ("training", objects.train, wanted.training),
        ("test", objects.test, wanted.test),
    )
    for part, split, most in parts:
        data = load_data(objects.dataset, split, "objects.dataset")
        if "label" not in data.column_names:
            raise ConfigError(f"objects.dataset: {objects.dataset} has no column `label`; {', '.join(data.column_names)}")
        concept_of: dict[int, str] = {}
        for concept, synsets in domain.imagenet.items():
            concept_of.update(dict.fromkeys(class_numbers(data.features["label"], synsets, concept), concept))
        labels = np.asarray(data["label"][:])
        rows: list[int] = []
        for concept in domain.concepts:
            own = np.flatnonzero(np.isin(labels, [number for number, name in concept_of.items() if name == concept]))
            rows += own[np.linspace(0, len(own) - 1, min(most, len(own))).astype(int)].tolist() if len(own) else []
        if not rows:
            continue
        called = getattr(data.features["label"], "int2str", str)
        images = LabelledImages.from_dataset(
            data.select(rows),
            labels="label",
            domains={domain.name: domain.concepts},
            names={called(number): concept for number, concept in concept_of.items()},
        )
        for image in images.images:
            assert isinstance(image.picture, RowPicture)
            digest = image.picture.name
            place: Split = "test" if part == "test" else "val" if int(digest[:12], 16) / 16**12 < _VALIDATION else "train"
            yield Used(digest, tuple(sorted(image.concepts)), place, None, part, rows[image.picture.row])


def class_numbers(feature: Any, synsets: Synsets, concept: str) -> list[int]:
    """The labels of a dataset that stand for a concept: by the synsets' names, or else by their numbers in ImageNet-1k.

    Raises:
        ConfigError: there are fewer classes, or they are in another order.
    """
    names: list[str] | None = getattr(feature, "names", None)
    if names is None:
        return list(synsets.values())
    if all(synset in names for synset in synsets):
        return [names.index(synset) for synset in synsets]
    number = max(synsets.values())
    called = names[number] if number < len(names) else "nothing: there are no more"
    if number >= len(names) or (len(synsets) == 1 and concept.lower() not in called.lower()):
        raise ConfigError(
            f"{concept!r} is class {number} of ImageNet-1k, which this dataset calls {called!r} (it has {len(names)} "
            "classes). Give a dataset with ImageNet's classes in their usual order, or with synsets (n02129604) as names"
        )
    return list(synsets.values())


def load_data(place: str, split: str, key: str) -> Any:
    """A dataset on the hub, one that `save_to_disk` wrote, or a folder of folders.

    Raises:
        ConfigError: it cannot be read; says by which key of the configuration it was named.
    """
    import datasets

    path = Path(place)
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            data: Any = datasets.load_from_disk(place)
            return data[split] if isinstance(data, datasets.DatasetDict) else data
        if path.is_dir():
            folder = path / split if (path / split).is_dir() else path
            return datasets.load_dataset("imagefolder", data_dir=str(folder))["train"]
        return datasets.load_dataset(place, split=split)
    except Exception as problem:  # whatever the network, the hub or a damaged file makes the library raise
        raise ConfigError(
            f"{key}: the split {split!r} of {place!r} cannot be read: {type(problem).__name__}: {problem}. It must be a "
            "dataset on the Hugging Face hub, one that save_to_disk wrote, or a folder. A gated one (ImageNet is) takes "
            "accepting its terms on its page, and `hf auth login`"
        ) from problem


class _Rows:
    """A dataset's rows, undecoded; it is opened when the first is asked for."""

    def __init__(self, objects: Objects, part: Part) -> None:
        self._objects, self._part = objects, part

    @cached_property
    def _source(self) -> Any:
        split = self._objects.train if self._part == "training" else self._objects.test
        source = find_source(load_data(self._objects.dataset, split, "objects.dataset"))
        if not isinstance(source, Sized) or source.column is None:
            raise ImagesError(f"{self._objects.dataset} has no column of images")
        return source

    def __getitem__(self, row: int) -> Any:
        return {"image": self._source.items[row][self._source.column]}


@dataclass(frozen=True)
class Pool:
    """The images of the concepts that are used."""

    images: LabelledImages
    left_out: Mapping[str, str]
    by_concept: Mapping[str, tuple[Labelled, ...]]

    @classmethod
    def of(cls, protocol: Protocol, collection: Collection, left_out: Mapping[str, str]) -> Pool:
        """Without the concepts that are left out."""
        out = {**collection.left_out, **left_out}
        domains = {one.name: tuple(c for c in one.concepts if c not in out) for one in protocol.domains}
        domains = {name: concepts for name, concepts in domains.items() if concepts}
        rows: dict[Part, Any] = {}
        if protocol.objects is not None:
            rows = {"training": _Rows(protocol.objects, "training"), "test": _Rows(protocol.objects, "test")}
        usable = {concept for concepts in domains.values() for concept in concepts}
        labelled: list[Labelled] = []
        for image in collection.images:
            concepts = usable.intersection(image.concepts)
            if not concepts:
                continue
            alone = (domains[name] for name in protocol.images.absent if name in domains)
            missing = {c for names in alone if not concepts.isdisjoint(names) for c in names} - concepts
            picture = (
                FilePicture(image.file, image.digest)
                if image.file is not None
                else RowPicture(rows[image.part or "training"], "image", image.row, image.digest)
            )
            labelled.append(Labelled(picture, frozenset(concepts), frozenset(missing), image.split))
        by_concept = {concept: tuple(one for one in labelled if concept in one.concepts) for concept in sorted(usable)}
        return cls(LabelledImages(tuple(labelled), domains), out, by_concept)

    @property
    def concepts(self) -> tuple[str, ...]:
        """Those that are used, domain by domain."""
        return tuple(concept for concepts in self.images.domains.values() for concept in concepts)

    def siblings(self, concept: str) -> tuple[str, ...]:
        """The other concepts of its domain."""
        return tuple(c for concepts in self.images.domains.values() if concept in concepts for c in concepts if c != concept)

    def holding(self, concept: str, splits: Iterable[Split] = ("train", "val")) -> list[Probe]:
        """Images that hold it: those to learn from, by default."""
        chosen = set(splits)
        return [self._probe(one) for one in self.by_concept[concept] if one.split in chosen]

    def others(self, concept: str, of: Sequence[str], most: int, splits: Iterable[Split] = ("train", "val")) -> list[Probe]:
        """Images to learn from that hold another concept of `of` and are not labelled with this one; each in its turn."""
        each = [[p for p in self.holding(name, splits) if concept not in p.concepts] for name in of if name != concept]
        turns = (probe for turn in zip_longest(*each) for probe in turn if probe is not None)
        return list({probe.name: probe for probe in turns}.values())[:most]

    def probes(self, wording: Wording, n: int, retained: int, split: Split = "test") -> ProbeSet:
        """The protocol's images."""
        return self.images.probes(wording, split=split, n=n, retained=retained)

    def training(self, wording: Wording, concepts: Sequence[str]) -> ProbeSet:
        """Of some concepts, the images to learn from: with each, and known to lack it."""
        learnt = {concept: self.holding(concept) for concept in self.concepts}
        every = {probe.name: probe for probes in learnt.values() for probe in probes}
        return ProbeSet(
            domains=self.images.domains,
            positives={concept: learnt[concept] for concept in concepts},
            retained={},
            negatives={
                concept: [probe for probe in every.values() if probe.lacks(concept)][: len(learnt[concept])]
                for concept in concepts
            },
            wording=wording,
        )

    def _probe(self, image: Labelled) -> Probe:
        return Probe(image.picture, image.concepts, self.images.known(image))
