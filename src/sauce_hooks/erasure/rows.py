"""Which part of what a block writes belongs to which row of a batch: exact, or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from sauce_hooks.errors import EditError
from sauce_hooks.hookpoint import (
    PIXELS,
    PLACEHOLDERS,
    VIDEO_PLACEHOLDERS,
    VIDEOS,
    TokenLayout,
    image_positions,
    placeholder_ids,
)


@dataclass(frozen=True)
class Batch:
    """What is known of the batch that the model was called with."""

    n: int | None = None
    """Rows of text; None if there was no text."""
    placeholders: tuple[int, ...] | None = None
    """Image (or video) tokens in each row of text; None if this family has none, or none are known."""
    pixels: tuple[int, ...] = ()
    """The shape of the pixels."""
    unclear: bool = False
    """Whose the images are cannot be told: there are images and videos, or no text where there ought to be some."""
    repeats: int = 1
    """Rows of this call for one row of `generate`'s: beams and returned sequences repeat rows in place."""
    images_rt: Bool[Tensor, "rows tokens"] | None = field(default=None, repr=False, compare=False)
    """Where images are in the text of this call; None if that is not known."""

    @classmethod
    def of(cls, config: Any, arguments: Mapping[str, Any], around: Batch | None = None) -> Batch:
        """From the arguments of a call, by name; `around` is the batch of the `generate` it is part of."""
        ids: Any = arguments.get("input_ids", arguments.get("inputs"))
        images, videos = (_first_tensor(arguments, names) for names in (PIXELS, VIDEOS))
        seen = images if images is not None else videos
        shape = () if seen is None else tuple(seen.shape)
        tokens = set(placeholder_ids(config, PLACEHOLDERS if images is not None or videos is None else VIDEO_PLACEHOLDERS))
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            return cls(pixels=shape, unclear=bool(tokens))
        counts = sum(((ids == token).sum(1) for token in tokens), start=ids.new_zeros(len(ids))).tolist()
        placeholders = tuple(int(c) for c in counts) if any(counts) else None
        before = around.n if around is not None else None
        repeats = len(ids) // before if before and len(ids) % before == 0 else 1
        unclear = images is not None and videos is not None
        return cls(len(ids), placeholders, shape, unclear, repeats, image_positions(config, arguments))


def row_sizes(n_rows: int, units: int, layout: TokenLayout, batch: Batch, *, projected: bool = False) -> list[int]:
    """How many of the `units` (entries of the block's batch, or tokens where images are packed) each row has.

    Only what follows from the shapes is used: an erasure that lands on the wrong row would leave a concept in another.
    What a projector packs (`projected`) takes the place of one image token each.

    Raises:
        EditError: it does not follow; the sizes must be given then.
    """
    repeats = _repeats(n_rows, batch)
    counts = batch.placeholders and tuple(
        sum(batch.placeholders[row * repeats : (row + 1) * repeats]) for row in range(n_rows)
    )
    dense = layout.shape != "packed" and not batch.unclear
    # Every row has an image, so at least one unit; there are as many units as rows: one each.
    if dense and units in (n_rows, n_rows * repeats) and (counts is None or all(counts)):
        return [units // n_rows] * n_rows
    # As many images as rows, each of as many tiles as the others, and none of them was dropped.
    images, tiles = (*batch.pixels[:2], 0, 0)[:2]
    rectangular = len(batch.pixels) >= 5 and images in (n_rows, n_rows * repeats) and units == images * tiles
    if dense and rectangular and (counts is None or all(counts)):
        return [units // n_rows] * n_rows
    if projected and layout.shape == "packed" and not batch.unclear and counts and units == sum(counts):
        return list(counts)
    # Every unit gives as many tokens as any other.
    if not batch.unclear and counts and layout.even and all(units * count % sum(counts) == 0 for count in counts):
        return [units * count // sum(counts) for count in counts]
    what = "patches" if layout.shape == "packed" else "images or tiles"
    raise EditError(
        f"which of the {units} {what} belong to which of the {n_rows} rows does not follow from the batch. Say how many "
        "each row has: eraser.for_rows(rows, sizes=[...])."
    )


def given_sizes(sizes: Sequence[int], units: int, layout: TokenLayout, batch: Batch) -> list[int]:
    """The sizes that a user gave, for a batch whose rows may be repeated; `EditError` if they are not those of the batch."""
    repeats = _repeats(len(sizes), batch)
    counts = batch.placeholders or ()
    told = [sum(counts[row * repeats : (row + 1) * repeats]) for row in range(len(sizes))]
    if (
        layout.even
        and counts
        and any(size * sum(told) != count * sum(sizes) for size, count in zip(sizes, told, strict=True))
    ):
        raise EditError(f"the rows have image tokens as {told}, which is not in proportion to the sizes {list(sizes)} given")
    if units not in (sum(sizes), sum(sizes) * repeats):
        raise EditError(
            f"the rows were said to have {sum(sizes)} images (tiles, or patches where they are packed) together, and there "
            f"are {units}"
        )
    return [size * units // sum(sizes) for size in sizes]


def text_sizes(n_rows: int, units: int, batch: Batch) -> list[int]:
    """How many rows of text, at a language layer, each row has: beams and returned sequences repeat it in place."""
    if units != n_rows * batch.repeats:
        raise EditError(
            f"the eraser is for {n_rows} rows, and {units} rows of text come"
            + (f", {batch.repeats} for each of the batch" if batch.repeats > 1 else "")
        )
    return [batch.repeats] * n_rows


def spans(sizes: Sequence[int]) -> list[slice]:
    """Consecutive parts of these sizes."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _repeats(n_rows: int, batch: Batch) -> int:
    if batch.placeholders is None and batch.repeats == 1:  # a dual encoder has as many texts as it likes
        return 1
    if batch.n not in (None, n_rows * batch.repeats):
        raise EditError(f"the eraser is for {n_rows} rows, but the batch has {(batch.n or 0) // batch.repeats}")
    return batch.repeats


def _first_tensor(arguments: Mapping[str, Any], names: Sequence[str]) -> Tensor | None:
    return next((arguments[name] for name in names if isinstance(arguments.get(name), Tensor)), None)
