"""Probe sets from images with labels: a folder for each concept, a table of labels, or a Hugging Face dataset.

What labels say is taken at its word and no further. A label says that a concept is in an image. Whether a concept that is
not named is absent must be declared (`absent`); otherwise nothing counts as absent, and what needs an absence (TNR,
AUROC, POPE, MME, CHAIR) is not measured. The other concepts of an image with one label are unknown, so SRA is not
measured either.

Every image belongs to one split, by a digest of its content. So no image is in two splits, whatever it is called, however
often it lies somewhere, and whatever else is added later. A picture that was saved anew is another file: near-duplicates are
not found.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from PIL import Image

from sauce_hooks.activations.images import open_image
from sauce_hooks.activations.sources import EXTENSIONS, Sized, find_source
from sauce_hooks.errors import ImagesError, ProbeError, UnknownConceptError, UnreadableImageWarning
from sauce_hooks.evaluation.probes import Picture, Probe, ProbeSet, Wording

Split = Literal["train", "val", "test"]
SHARES: Mapping[Split, float] = MappingProxyType({"train": 0.6, "val": 0.2, "test": 0.2})
"""About how much of the images each split has: features are chosen on `train`, settings on `val`, figures are of `test`."""
Unlabelled = Literal["unknown", "domain", "all"]
"""What is declared of the concepts that an image is not labelled with: nothing is known of them; those of the same domain
as one of its labels are absent (an image shows one sport, one emotion); all are absent (the labels are complete)."""
_SHOWN = 5


@dataclass(frozen=True)
class FilePicture:
    """An image file, opened when it is needed."""

    path: str
    name: str
    """The digest of its content."""

    def open(self) -> Image.Image:
        """The image, RGB, upright.

        Raises:
            ImagesError: it cannot be decoded.
        """
        return _opened(self.path, self.path)


@dataclass(frozen=True)
class RowPicture:
    """An image in a row of a Hugging Face dataset, decoded when it is needed."""

    rows: Any
    column: str
    row: int
    name: str

    def open(self) -> Image.Image:
        """The image, RGB, upright.

        Raises:
            ImagesError: it cannot be decoded.
        """
        return _opened(self.rows[self.row][self.column], f"row {self.row}")


def _opened(content: Any, name: str) -> Image.Image:
    try:
        return open_image(content)
    except OSError as problem:
        raise ImagesError(f"{name} cannot be decoded: {problem}. Remove it") from problem


@dataclass(frozen=True)
class Labelled:
    """An image and what its labels say."""

    picture: Picture
    concepts: frozenset[str]
    missing: frozenset[str] = frozenset()
    """Concepts that are said not to be in it."""
    belongs: Split | None = None
    """Where it belongs, if it comes from a dataset that has splits of its own."""

    @property
    def split(self) -> Split:
        """Where the image belongs: by its dataset's own split, or else by the digest of its content and nothing else."""
        return self.belongs or split_of(self.picture.name)


def split_of(digest: str) -> Split:
    """The split of an image with this hexadecimal digest."""
    place, below = int(digest[:12], 16) / 16**12, 0.0
    for split, share in SHARES.items():
        below += share
        if place < below:
            return split
    return "test"


@dataclass(frozen=True)
class LabelledImages:
    """Images with labels, in three splits that share none.

    Raises:
        UnknownConceptError: an image with a label that no domain has.
        ProbeError: a concept of two domains.
    """

    images: tuple[Labelled, ...]
    domains: Mapping[str, tuple[str, ...]]
    absent: Unlabelled = "unknown"

    def __post_init__(self) -> None:
        known = {concept for names in self.domains.values() for concept in names}
        strange = sorted({concept for image in self.images for concept in image.concepts} - known)
        if strange:
            raise UnknownConceptError(strange[0], sorted(known))
        times = Counter(concept for names in self.domains.values() for concept in names)
        if twice := sorted(concept for concept, n in times.items() if n > 1):
            raise ProbeError(
                f"{', '.join(twice)}: in two domains, or twice in one. One name must mean one thing: call one of them "
                "otherwise (names=, or the folder's name)"
            )

    @classmethod
    def from_folder(
        cls, root: str | Path, *, absent: Unlabelled = "unknown", names: Mapping[str, str] = MappingProxyType({})
    ) -> LabelledImages:
        """One folder a concept, `tiger/*.jpg`, or in folders that are domains, `object/tiger/*.jpg`.

        Args:
            root: the folder of folders.
            absent: what is declared of concepts that an image is not labelled with. An image that lies in several folders
                has all their labels.
            names: the concept of a folder, where its name is no word ("n02129604": "tiger"). Else "_" becomes a space.

        Raises:
            ImagesError: no such folder, no image, or none that can be read.
            ProbeError: images that lie neither in concepts nor in concepts of domains, or some in the one and some in the
                other.
        """
        top = Path(root)
        if not top.is_dir():
            raise ImagesError(f"no such folder of images: {top}")
        found = sorted(
            path.relative_to(top)
            for path in (Path(place) / file for place, _, files in os.walk(top) for file in files)
            if path.suffix.lower() in EXTENSIONS
        )
        depths = {len(path.parts) for path in found}
        if not depths <= {2} and not depths <= {3}:
            some = ", ".join(str(next(p for p in found if len(p.parts) == depth)) for depth in sorted(depths))
            raise ProbeError(
                f"images must lie in {top}/CONCEPT/ or all in {top}/DOMAIN/CONCEPT/; found images at several places, or "
                f"elsewhere: {some}"
            )
        if not found:
            raise ImagesError(f"no image files in the folders of {top}")

        def called(folder: str) -> str:
            return names.get(folder, folder.replace("_", " "))

        domains: dict[str, dict[str, None]] = {}
        labelled: list[tuple[str, frozenset[str], frozenset[str]]] = []
        for path in found:
            domain = path.parts[0] if len(path.parts) == 3 else "concept"
            concept = called(path.parent.name)
            domains.setdefault(domain, {})[concept] = None
            labelled.append((str(top / path), frozenset({concept}), frozenset()))
        return cls(tuple(_merged(_files(labelled))), {d: tuple(c) for d, c in domains.items()}, absent)

    @classmethod
    def from_table(
        cls, path: str | Path, *, absent: Unlabelled = "unknown", domains: Mapping[str, Sequence[str]] | None = None
    ) -> LabelledImages:
        """A CSV file with the columns `image` and `concepts` ("tiger;red"), or JSON lines with the same keys and lists.

        A further column `absent` names concepts that are not in the image. Paths are relative to the table's folder and may
        not leave it.

        Args:
            path: the table; ".csv" or ".jsonl".
            absent: what is declared of concepts that a row does not name.
            domains: the concepts by domain; one domain of all that the table names by default.

        Raises:
            ImagesError: no such file, or no image that can be read.
            ProbeError: a table without these columns, or a path that leaves its folder.
        """
        table = Path(path)
        if not table.is_file():
            raise ImagesError(f"no such table of labels: {table}")
        root = table.parent.resolve()
        labelled: list[tuple[str, frozenset[str], frozenset[str]]] = []
        for number, row in _rows(table):
            image, concepts = row.get("image"), row.get("concepts")
            if not isinstance(image, str) or concepts is None:
                raise ProbeError(
                    f"{table}, row {number}: `image` and `concepts` are needed; found {', '.join(map(str, row))}"
                )
            file = (root / image).resolve()
            if not file.is_relative_to(root):
                raise ProbeError(f"{table}, row {number}: {image!r} leads out of the table's folder")
            labelled.append((str(file), _listed(concepts), _listed(row.get("absent"))))
        named = dict.fromkeys(concept for _, held, missing in labelled for concept in sorted(held | missing))
        by_domain = {"concept": tuple(named)} if domains is None else {d: tuple(c) for d, c in domains.items()}
        return cls(tuple(_merged(_files(labelled))), by_domain, absent)

    @classmethod
    def from_dataset(
        cls,
        data: Any,
        *,
        labels: str | None = None,
        absent: Unlabelled = "unknown",
        domains: Mapping[str, Sequence[str]] | None = None,
        names: Mapping[str, str] = MappingProxyType({}),
    ) -> LabelledImages:
        """A Hugging Face dataset with an image column, and a column with a label or a list of labels.

        Args:
            data: a `datasets.Dataset`: one split, not streamed.
            labels: the column of labels; by default "concepts", "labels" or "label". Numbers of a `ClassLabel` become names.
            absent: what is declared of concepts that a row does not name.
            domains: the concepts by domain; rows are kept for the concepts in it. By default one domain of all labels.
            names: the concept of a label, where the label is no word, or not the one that is asked for.

        Raises:
            ImagesError: no image column, or no image that can be read.
            ProbeError: no column of labels, or a streamed dataset.
        """
        source = find_source(data)
        if not isinstance(source, Sized) or source.column is None:
            raise ProbeError(f"cannot read labels of {type(data).__name__}: give a datasets.Dataset that is not streamed")
        column = labels or next((name for name in ("concepts", "labels", "label") if name in data.column_names), None)
        if column not in data.column_names:
            raise ProbeError(f"no column of labels (labels={labels!r}); the columns are {', '.join(data.column_names)}")
        called = _label_names(data.features[column])
        kept = None if domains is None else {concept for some in domains.values() for concept in some}
        found: list[Labelled] = []
        for i, label in enumerate(data[column]):
            each = label if isinstance(label, list | tuple) else [label]
            said = (called(one) for one in each if one is not None and one != -1)  # −1: no label, by the library's custom
            concepts = frozenset(names.get(name, name) for name in said)
            concepts = concepts if kept is None else concepts & kept
            if concepts:
                content = source.items[i][source.column]
                found.append(Labelled(RowPicture(source.items, source.column, i, _digest_of_row(content)), concepts))
        named = dict.fromkeys(sorted({concept for image in found for concept in image.concepts}))
        by_domain = {"concept": tuple(named)} if domains is None else {d: tuple(c) for d, c in domains.items()}
        return cls(tuple(_merged(found)), by_domain, absent)

    def known(self, image: Labelled) -> frozenset[str] | None:
        """Of which concepts it is known whether they are in an image; None: of all."""
        if self.absent == "all":
            return None
        said = image.concepts | image.missing
        if self.absent == "domain":
            return said.union(*(names for names in self.domains.values() if not image.concepts.isdisjoint(names)))
        return said

    def contrast(self, concept: str, *, split: Split = "train") -> tuple[Sequence[Any], Sequence[Any]]:
        """Images of a split that hold a concept, and images known to lack it, to learn the concept from.

        Returns:
            The two sets, as paths, or as a sequence that opens a row when it is asked for.

        Raises:
            UnknownConceptError: no such concept.
            ProbeError: one of the sets is empty.
        """
        probes = self._probes(split)
        self._check(concept)
        sets = [p for p in probes if concept in p.concepts], [p for p in probes if p.lacks(concept)]
        for found, which in zip(sets, ("holds", "is known to lack"), strict=True):
            if not found:
                raise ProbeError(
                    f"no image of split {split!r} {which} {concept!r}. "
                    + (_DECLARE if which != "holds" else "Add images of it")
                )
        return _unopened(sets[0]), _unopened(sets[1])

    def probes(self, wording: Wording, *, split: Split = "test", n: int = 50, retained: int = 10) -> ProbeSet:
        """The protocol's images: all of one split.

        Args:
            wording: how the model is asked; see `sauce_hooks.evaluation.wording`.
            split: "val" to choose settings, "test" to report.
            n: images that hold each concept, and as many known to lack it, at most.
            retained: images of each concept for IRA and CRA, at most. Where there are not `n` + `retained`, they are some
                of the same images: a concept's own images are asked about only while it is erased, and these only while
                another is.
        """
        chosen = sorted(self._probes(split), key=lambda probe: probe.name)

        def lacking(concept: str) -> list[Probe]:
            found = [p for p in chosen if p.lacks(concept)]
            return sorted(found, key=lambda p: hashlib.sha256(f"{concept} {p.name}".encode()).hexdigest())[:n]

        holding = {
            concept: [p for p in chosen if concept in p.concepts] for some in self.domains.values() for concept in some
        }
        return ProbeSet(
            domains=self.domains,
            positives={concept: found[:n] for concept, found in holding.items()},
            retained={concept: found[-retained:] if retained else [] for concept, found in holding.items()},
            negatives={concept: lacking(concept) for concept in holding},
            wording=wording,
        )

    def _probes(self, split: Split) -> list[Probe]:
        return [Probe(image.picture, image.concepts, self.known(image)) for image in self.images if image.split == split]

    def _check(self, concept: str) -> None:
        known = [name for names in self.domains.values() for name in names]
        if concept not in known:
            raise UnknownConceptError(concept, known)


_DECLARE = (
    'Labels say what is in an image, not what is not: declare absent="domain" if an image shows one concept of its domain, '
    'or absent="all" if its labels are complete'
)


def _unopened(probes: Sequence[Probe]) -> Sequence[Any]:
    """Images as the library's other rooms take them: paths, or something that opens them one by one."""
    paths = [probe.source.path for probe in probes if isinstance(probe.source, FilePicture)]
    return paths if len(paths) == len(probes) else Opening(probes)


class Opening(Sequence[Image.Image]):
    """The images of probes, each opened when it is asked for."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        self._probes = probes

    def __len__(self) -> int:
        return len(self._probes)

    def __getitem__(self, i: Any) -> Any:
        return Opening(self._probes[i]) if isinstance(i, slice) else self._probes[i].image


def _files(labelled: Iterable[tuple[str, frozenset[str], frozenset[str]]]) -> Iterator[Labelled]:
    """The files that are images. Each is read once, for its digest, and none stays open."""
    broken: list[str] = []
    total = 0
    for path, concepts, missing in labelled:
        total += 1
        try:
            content = Path(path).read_bytes()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                Image.open(io.BytesIO(content)).verify()
        except Exception as problem:  # whatever a damaged file makes Pillow stumble over
            broken.append(f"{path} ({type(problem).__name__})")
            continue
        yield Labelled(FilePicture(path, hashlib.sha256(content).hexdigest()), concepts, missing)
    listing = ", ".join(broken[:_SHOWN]) + ("; ..." if len(broken) > _SHOWN else "")
    if total == len(broken):
        raise ImagesError(f"none of the {total} images can be read: {listing}")
    if broken:
        warnings.warn(f"skipped {len(broken)} of {total} images: {listing}", UnreadableImageWarning, stacklevel=4)


def _merged(images: Iterable[Labelled]) -> Iterator[Labelled]:
    """Each image once, with all its labels.

    Raises:
        ProbeError: a concept is said to be in an image, and not to be.
    """
    by_name: dict[str, Labelled] = {}
    for image in images:
        name = image.picture.name
        if name in by_name:
            same = by_name[name]
            by_name[name] = replace(same, concepts=same.concepts | image.concepts, missing=same.missing | image.missing)
        else:
            by_name[name] = image
    for image in by_name.values():
        both = image.concepts & image.missing
        if both:
            raise ProbeError(f"{image.picture} is said to hold and to lack {', '.join(sorted(both))}")
    yield from by_name.values()


def _rows(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    text = table.read_text(encoding="utf-8-sig")
    if table.suffix.lower() == ".csv":
        yield from enumerate(csv.DictReader(io.StringIO(text)), 2)
        return
    if table.suffix.lower() != ".jsonl":
        raise ProbeError(f"{table}: a table of labels is a .csv or a .jsonl file")
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as problem:
                raise ProbeError(f"{table}, line {number} is no JSON: {problem}") from problem
            if not isinstance(row, dict):
                raise ProbeError(f"{table}, line {number} is no JSON object")
            yield number, row  # pyright: ignore[reportUnknownVariableType]


def _listed(value: Any) -> frozenset[str]:
    """Concepts, as a list or with semicolons between them."""
    items = value.split(";") if isinstance(value, str) else (value or ())
    return frozenset(str(item).strip() for item in items if str(item).strip())


def _label_names(feature: Any) -> Any:
    """What a label is called: by its `ClassLabel`, alone or in a list, or by itself."""
    from datasets import ClassLabel

    inner = getattr(feature, "feature", feature)
    return inner.int2str if isinstance(inner, ClassLabel) else str


def _digest_of_row(content: Any) -> str:
    """Of the encoded image; of a row that names a file, the file; else of the pixels."""
    if isinstance(content, Mapping):
        if content.get("bytes") is not None:
            return hashlib.sha256(content["bytes"]).hexdigest()
        if content.get("path") and os.path.isfile(content["path"]):
            return hashlib.sha256(Path(content["path"]).read_bytes()).hexdigest()
    picture = open_image(content)
    return hashlib.sha256(f"{picture.mode} {picture.size}".encode() + picture.tobytes()).hexdigest()
