"""All edits active at one block, on what the block gave: merged, on the chosen tokens, row by row where rows differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sauce_hooks.erasure.attachment import Attachment
from sauce_hooks.erasure.merging import Edit, MergedEdit, Positions
from sauce_hooks.erasure.rows import Batch, given_sizes, row_sizes, spans, text_sizes
from sauce_hooks.errors import EditError
from sauce_hooks.hookpoint import as_output, as_tokens, positions

Merge = Callable[[Any, Sequence[Edit]], MergedEdit]
"""Edits to one function of the activations; the key stands for them, so that the function may be remembered."""


def edit_output(attachments: Sequence[Attachment], output: Any) -> Any:
    """What edits at one place make of what the block gave."""
    point = attachments[0].hook_point
    edited = edit_tokens(attachments, as_tokens(output, point), Batch(unclear=True), lambda key, edits: MergedEdit(edits))
    return output if edited is None else as_output(edited, output, point)


def edited_positions(attachment: Attachment, acts_utd: Tensor, batch: Batch) -> Bool[Tensor, "units tokens"]:
    """Which tokens are edited. Edits at one place agree on that.

    Raises:
        EditError: where the images are in a text is not known.
    """
    mask_ut = torch.zeros(acts_utd.shape[:2], dtype=torch.bool, device=acts_utd.device)
    for units, chosen in _pieces(attachment, slice(0, len(acts_utd)), acts_utd, batch):
        mask_ut[units, slice(None) if chosen is None else list(chosen)] = True
    return mask_ut


def edit_tokens(
    here: Sequence[Attachment], acts_utd: Float[Tensor, "units tokens d"], batch: Batch, merge: Merge
) -> Float[Tensor, "units tokens d"] | None:
    """What all active edits make of the block's tokens; None if nothing changes.

    Raises:
        EditError: which image belongs to which row, or where it is in a text, is not known, or erasers for different
            numbers of rows are on.
    """
    by_row = [a for a in here if a.rows is not None]
    if not by_row:
        merged = merge(tuple(here), [a.edit for a in here])
        whole = slice(0, len(acts_utd))
        return None if merged.is_null else _edited([(whole, merged)], here[0], acts_utd, batch)
    n_rows = {len(a.rows or ()) for a in by_row}
    if len(n_rows) > 1:
        raise EditError(f"erasers for {' and for '.join(map(str, sorted(n_rows)))} rows cannot be on together")
    packed = by_row[0].hook_point.layout.shape == "packed"
    parts: list[tuple[slice, MergedEdit]] = []
    for row, span in enumerate(_row_spans(by_row, acts_utd.shape[1 if packed else 0], batch)):
        merged = merge((tuple(here), row), [edit for a in here for edit in (a.edit, *((a.rows[row],) if a.rows else ()))])
        if not merged.is_null and span.stop > span.start:
            parts.append((span, merged))
    if not packed:
        return _edited(parts, here[0], acts_utd, batch)
    out = acts_utd.clone()
    for span, merged in parts:
        out[:, span] = merged(acts_utd[:, span])
    return out


def _edited(
    parts: Sequence[tuple[slice, MergedEdit]], one: Attachment, acts_utd: Tensor, batch: Batch
) -> Float[Tensor, "units tokens d"] | None:
    """Units edited each by its own edit, on the tokens that are chosen in them."""
    pieces = [(units, chosen, edit) for span, edit in parts for units, chosen in _pieces(one, span, acts_utd, batch)]
    if not pieces:
        return None
    if len(pieces) == 1 and pieces[0][0] == slice(0, len(acts_utd)):
        return pieces[0][2](acts_utd, pieces[0][1])
    out = acts_utd.clone()
    for units, chosen, edit in pieces:
        out[units] = edit(acts_utd[units], chosen)
    return out


def _pieces(one: Attachment, span: slice, acts_utd: Tensor, batch: Batch) -> list[tuple[slice, Positions]]:
    """Units of a span with the positions that are edited in them; None for all of them. Not one where there are none."""
    point, n = one.hook_point, acts_utd.shape[1]
    if point.place != "language" or one.edit.tokens == "all":
        chosen = positions(point.layout, one.edit.tokens, n)
        return [(span, None if chosen == range(n) else chosen)]
    where_ut = batch.images_rt
    if where_ut is None or where_ut.shape != acts_utd.shape[:2]:
        raise EditError(
            f"where the images are in the text at {point.path} cannot be told, because the model was called without the "
            "input_ids of that text (with inputs_embeds, say). Give input_ids, or wrap the SAE with "
            "tokens=TokenPolicy(edit='all'), which edits every token."
        )
    rows = [tuple(torch.nonzero(where_t)[:, 0].tolist()) for where_t in where_ut[span].cpu()]
    if len(set(rows)) == 1:  # all at once
        return [(span, rows[0])] if rows[0] else []
    return [(slice(span.start + i, span.start + i + 1), chosen) for i, chosen in enumerate(rows) if chosen]


def _row_spans(by_row: Sequence[Attachment], units: int, batch: Batch) -> list[slice]:
    point, sizes = by_row[0].hook_point, {a.sizes for a in by_row} - {None}
    n_rows = len(by_row[0].rows or ())
    if point.place == "language":
        return spans(text_sizes(n_rows, units, batch))
    if len(sizes) > 1:
        raise EditError(
            f"erasers for rows of the sizes {' and '.join(str(list(s or ())) for s in sizes)} cannot be on together"
        )
    given = next(iter(sizes), None)
    if given is not None:
        return spans(given_sizes(given, units, point.layout, batch))
    return spans(row_sizes(n_rows, units, point.layout, batch, projected=point.place == "projector"))
