"""Opening images: one RGB picture each, wherever they come from, and batches of model inputs made of them."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sauce_hooks.activations.sources import (
    Batches,
    HubStream,
    Inputs,
    Item,
    Once,
    Shards,
    count_inputs,
    find_source,
    is_inputs,
    iter_items,
)
from sauce_hooks.errors import ImagesError, UnreadableImageWarning

NEEDS_PROCESSOR = "images need a processor=...: the model's AutoProcessor. Only batches of model inputs do not."


@dataclass(frozen=True)
class BrokenImage:
    """An image that cannot be read."""

    index: int
    """Its position in the data; in a stream, in this epoch's order."""
    name: str
    """Its path, row, or shard and key."""
    reason: str


@dataclass(frozen=True)
class ImageBatch:
    """Some images, ready for the model."""

    inputs: Inputs | None
    """Model inputs of the images that could be read; None where there are none."""
    indices: Int[Tensor, " n"]
    """The position in the data of each image in `inputs`; in a stream, in this epoch's order."""
    broken: tuple[BrokenImage, ...] = ()

    def pin_memory(self) -> ImageBatch:
        """The same with inputs in page-locked memory, as torch's loader asks for it: a GPU takes them from there itself."""
        if self.inputs is None:
            return self
        return replace(self, inputs={n: v.pin_memory() if hasattr(v, "pin_memory") else v for n, v in self.inputs.items()})

    def __len__(self) -> int:
        """Images, readable or not."""
        return len(self.indices) + len(self.broken)


# One image. ----------------------------------------------------------------------------------------------------------


def open_image(content: Any) -> Image.Image:
    """One item as an RGB picture, turned upright as its EXIF data says.

    Raises:
        OSError: it cannot be decoded.
        ImagesError: it is nothing that an image can be read from.
    """
    if isinstance(content, Mapping) and "image" in content:  # a row of a Hugging Face dataset
        return open_image(content["image"])
    if isinstance(content, Exception):
        raise content
    if content is None:
        raise OSError("no image")
    encoded = isinstance(content, Mapping) and ("bytes" in content or "path" in content)  # the same, not decoded
    if not (encoded or isinstance(content, Image.Image | str | Path | bytes | Tensor | np.ndarray)):
        raise ImagesError(f"cannot read an image from {type(content).__name__}")
    try:
        return _decoded(content)
    except UnidentifiedImageError as problem:  # it names a buffer by its address
        raise OSError("not an image of a known format") from problem
    except Exception as problem:  # Pillow's decoders raise whatever a damaged file makes them stumble over
        raise OSError(str(problem) or type(problem).__name__) from problem


def _decoded(content: Any) -> Image.Image:
    if isinstance(content, Image.Image):
        return _rgb(content)
    if isinstance(content, Tensor | np.ndarray):
        return _from_array(content)
    if isinstance(content, Mapping):
        if content.get("bytes") is None:
            return _from_path(content)
        content = content["bytes"]
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
        return _rgb(image)


def _from_path(row: Mapping[str, Any]) -> Image.Image:
    """A row that says where its image lies: also within an archive, or far away."""
    from datasets import Image as ImageFeature

    if row.get("path") is None:
        raise OSError("no image: neither bytes nor path")
    return _rgb(ImageFeature().decode_example({"path": row["path"], "bytes": None}))


def _rgb(image: Image.Image) -> Image.Image:
    if image.format == "EPS":
        raise OSError("PostScript is a program, which is not run")
    orientation = 1
    with suppress(Exception):  # damaged EXIF data does not spoil the picture
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, which `convert` would cut off at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _from_array(array: Any) -> Image.Image:
    if isinstance(array, Tensor):
        array = array.detach().cpu().numpy()
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = np.moveaxis(array, 0, 2)
    if np.issubdtype(array.dtype, np.floating):
        array = (array * 255).round().clip(0, 255)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    return Image.fromarray(array.astype(np.uint8)).convert("RGB")


def _attempt(item: Item) -> Image.Image | BrokenImage:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
            return open_image(item.content)
    except OSError as problem:
        return _broken(item, str(problem))


def _broken(item: Item, reason: str) -> BrokenImage:
    name = item.name if item.name is not None else _described(item)
    return BrokenImage(item.index, name, " ".join(reason.split())[:200])


def _described(item: Item) -> str:
    """A name for a row that has none, the same in whatever order the rows come."""
    row = item.content if isinstance(item.content, Mapping) else {}
    path, data = row.get("path"), row.get("bytes")
    if data is None:
        return path or ("a row without an image" if item.content is None else f"row {item.index}")
    return f"{path or 'image'} (sha256 {hashlib.sha256(data).hexdigest()[:12]})"


# Batches. ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepare:
    """Opens images and makes model inputs of them."""

    processor: Any
    dtype: torch.dtype | None = None
    """Of floating inputs: the tower's, made where many processes share the work; half the memory on the way."""

    def __call__(self, items: Sequence[Item]) -> ImageBatch:
        """One batch; the images that cannot be read are left out and named.

        Raises:
            ImagesError: an item is nothing that an image can be read from.
        """
        if items and is_inputs(items[0].content):  # batches of model inputs come one at a time
            inputs = items[0].content
            return ImageBatch(inputs, items[0].index + torch.arange(count_inputs(inputs)))
        tried = [_attempt(item) for item in items]
        try:
            return self._made(items, tried)
        except Exception:  # a picture that the processor will not take: a strip, say, or a single pixel
            tried = [self._processed(item, one) for item, one in zip(items, tried, strict=True)]
            return self._made(items, tried)

    def _made(self, items: Sequence[Item], tried: Sequence[Image.Image | BrokenImage]) -> ImageBatch:
        pictures = [picture for picture in tried if isinstance(picture, Image.Image)]
        broken = tuple(one for one in tried if isinstance(one, BrokenImage))
        good = [item.index for item, one in zip(items, tried, strict=True) if isinstance(one, Image.Image)]
        return ImageBatch(self._inputs(pictures) if pictures else None, torch.tensor(good, dtype=torch.long), broken)

    def _processed(self, item: Item, picture: Image.Image | BrokenImage) -> Image.Image | BrokenImage:
        """The picture, if the processor takes it alone."""
        if isinstance(picture, Image.Image):
            try:
                self._inputs([picture])
            except Exception as problem:  # whatever it makes the processor stumble over
                return _broken(item, f"the processor does not take it: {problem}")
        return picture

    def _inputs(self, pictures: list[Image.Image]) -> Inputs:
        process = getattr(self.processor, "image_processor", self.processor)
        made = dict(process(images=pictures, return_tensors="pt"))
        return {name: self._cast(value) for name, value in made.items()}

    def _cast(self, value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.dtype) if floating and self.dtype is not None else value


def judge(seen: int, broken: int, examples: Sequence[BrokenImage]) -> None:
    """Whether what was seen will do: a warning where some could not be read.

    Raises:
        ImagesError: none could be read, or there were none.
    """
    names = listing(examples, broken)
    if seen == broken:
        raise ImagesError(f"none of the {broken} images can be read: {names}" if broken else "no images")
    if broken:
        message = f"skipped {broken} of {seen} images that cannot be read: {names}"
        warnings.warn(message, UnreadableImageWarning, stacklevel=3)


def listing(examples: Sequence[BrokenImage], total: int) -> str:
    """The first five by name, with what is wrong with them."""
    names = "; ".join(f"{one.name} ({one.reason})" for one in examples[:5])
    return names + ("; ..." if total > 5 else "")


def iter_images(images: Any) -> Iterator[Image.Image]:
    """Every readable image, in order.

    Files that cannot be read are skipped; an `UnreadableImageWarning` at the end counts and names them.

    Raises:
        ImagesError: there is no image at all, or none that can be read.
    """
    seen, broken = 0, list[BrokenImage]()
    for item in iter_items(find_source(images)):
        picture = _attempt(item)
        seen += 1
        if isinstance(picture, BrokenImage):
            broken.append(picture)
        else:
            yield picture
    judge(seen, len(broken), broken)


def count_images(images: Any) -> int:
    """How many images there are, readable or not.

    Raises:
        ImagesError: nobody knows before they are read, as with a stream, shards or an iterator.
    """
    source = find_source(images)
    if isinstance(source, Once | HubStream | Shards):
        raise ImagesError(f"the number of images in a {type(images).__name__} is not known: give a list or a folder")
    return len(source)


def iter_inputs(images: Any, processor: Any, batch_size: int) -> Iterator[Inputs]:
    """Batches of model inputs: the images processed, or the batches given passed through (these need no processor).

    Images that cannot be read are skipped; an `UnreadableImageWarning` at the end counts and names them.

    Raises:
        ImagesError: images were given without a processor, or none can be read.
    """
    source = find_source(images)
    if isinstance(source, Batches):
        yield from source.batches
        return
    items = iter_items(source)
    first = next(items, None)
    if first is not None and is_inputs(first.content):  # out of an iterator
        yield first.content
        yield from (item.content for item in items)
        return
    items = chain(() if first is None else (first,), items)
    if processor is None:
        raise ImagesError(NEEDS_PROCESSOR)
    prepare = Prepare(processor)
    seen, broken = 0, list[BrokenImage]()
    while chunk := list(islice(items, batch_size)):
        batch = prepare(chunk)
        seen += len(batch)
        broken += batch.broken
        if batch.inputs is not None:
            yield batch.inputs
    judge(seen, len(broken), broken)


_NESTED = frozenset({"MllamaProcessor"})
"""Processors that take a flat list of images for those of one prompt."""


def one_a_prompt(images: Sequence[Any], processor: Any) -> list[Any]:
    """Images as a processor takes them beside as many prompts, each with one image."""
    return [[image] for image in images] if type(processor).__name__ in _NESTED else list(images)


def to_device(inputs: Inputs, like: Tensor) -> dict[str, Any]:
    """The tensors on a parameter's device, floating ones in its dtype."""

    def placed(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            value = torch.as_tensor(value)
        if not isinstance(value, Tensor):
            return value
        dtype = like.dtype if value.is_floating_point() else None
        return value.to(like.device, dtype, non_blocking=like.is_cuda and value.is_pinned())

    return {name: placed(value) for name, value in inputs.items()}
