"""Putting edits on a model and taking them off again."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from sauce_hooks.erasure.attachment import Attachment, Scope, of_this_task
from sauce_hooks.erasure.compiled import hooks_guarded
from sauce_hooks.erasure.merging import Edit
from sauce_hooks.erasure.site import Proof, Site
from sauce_hooks.errors import EditError, IneffectiveEraserError
from sauce_hooks.hookpoint import HookPoint, unwrap

_lock = threading.RLock()
_sites: WeakKeyDictionary[nn.Module, Site] = WeakKeyDictionary()
_proofs: WeakKeyDictionary[nn.Module, set[Proof]] = WeakKeyDictionary()
"""What has been proven of a model holds after its erasers have gone."""


def attach(
    model: Any,
    hook_point: HookPoint,
    edit: Edit,
    *,
    rows: Sequence[Edit] | None = None,
    sizes: Sequence[int] | None = None,
    scope: Scope = "model",
    allow_bypass: bool = False,
) -> Attachment:
    """Put an edit into effect; with others already there it is merged, in whatever order they come.

    Raises:
        IneffectiveEraserError: the language side does not read what the edit writes, or not only that.
        EditError: it contradicts an edit already there. Nothing has changed then.
        HookPointError: the model has no such place.
    """
    root = unwrap(model)
    block = hook_point.module(root)
    attachment = Attachment(
        hook_point,
        edit,
        None if rows is None else tuple(rows),
        None if sizes is None else tuple(sizes),
        scope,
        allow_bypass,
    )
    check_read(attachment)
    from sauce_hooks.erasure.bake import check_not_baked  # which itself attaches

    for one in (edit, *(rows or ())):
        check_not_baked(block, one)
    with _lock:
        if any(site.hooks(block) for other, site in _sites.items() if other is not root):
            raise EditError(
                f"{hook_point.path} is being edited already, through another model that it is part of: put all erasers of a "
                "tower on one and the same model"
            )
        hooks_guarded()
        site = _sites.get(root)
        if site is None:
            site = Site(root, _proofs.setdefault(root, set()))
        site.add(root, attachment)
        _sites[root] = site
    if scope == "task":
        of_this_task.set((*(a for a in of_this_task.get() if a.active), attachment))
    return attachment


def detach(attachment: Attachment) -> None:
    """Take an edit out of effect; the model is as it was once the last one is gone."""
    with _lock:
        site, attachment.site = attachment.site, None
        if site is not None and site.remove(attachment):
            for root, other in list(_sites.items()):
                if other is site:
                    del _sites[root]
        hooks_guarded()  # dynamo may have come meanwhile
    of_this_task.set(tuple(a for a in of_this_task.get() if a is not attachment))


def check_ran(attachment: Attachment) -> None:
    """`IneffectiveEraserError` if images went through the model while the edit was attached and it did not take effect."""
    if attachment.problem:
        raise IneffectiveEraserError(attachment.problem)
    if attachment.images_seen and not attachment.edits_run:
        raise IneffectiveEraserError(
            f"images went through the model {attachment.images_seen} times, but the edit of {attachment.hook_point.path} "
            "never ran: nothing was erased. Does the model run elsewhere (an exported copy), or has scope='task' "
            "kept the eraser to the thread or task that entered it?"
        )


def check_read(attachment: Attachment) -> None:
    """`IneffectiveEraserError` if the language side is known not to read what the edit writes, or not only that."""
    point = attachment.hook_point
    if attachment.is_null:
        return
    if attachment.looks_for_images:
        _check_words(attachment)
        return
    if point.layer > point.last_read:
        raise IneffectiveEraserError(
            f"{point.path} is block {point.layer + 1} of {point.n_layers}, but the language side reads the output of block "
            f"{point.last_read + 1}: an edit there changes nothing. Use find_hook_point(model), which picks a block that is "
            "read."
        )
    if attachment.allow_bypass:
        return
    if point.layer > point.first_read:
        raise IneffectiveEraserError(
            f"the language side reads the blocks {', '.join(str(i + 1) for i in point.reads)}: what it reads before block "
            f"{point.layer + 1} goes by this edit unchanged. Use find_hook_point(model), which picks the first that is "
            "read; allow_bypass=True erases in part."
        )
    if point.layout.class_read and attachment.edit.tokens == "patches":
        raise IneffectiveEraserError(
            "the language side reads the class token too, and the concept is in it, but only patches are edited. Wrap or "
            "train the SAE with tokens=TokenPolicy(edit='all'); allow_bypass=True erases in part."
        )


def _check_words(attachment: Attachment) -> None:
    """The same at a language layer, for the image's positions alone: words read them in every layer but the last."""
    point = attachment.hook_point
    if point.layer == point.last_read:
        raise IneffectiveEraserError(
            f"{point.path} is the last layer: no word looks at the image's positions behind it, so an edit of those alone "
            "changes nothing. Use an earlier layer, or wrap the SAE with tokens=TokenPolicy(edit='all')."
        )
    if not attachment.allow_bypass:
        raise IneffectiveEraserError(
            f"up to {point.path} words have looked at the image in {point.layer + 1} layers, and only its own positions "
            "are edited. Wrap or train the SAE with tokens=TokenPolicy(edit='all'), which edits the words too; "
            "allow_bypass=True erases in part."
        )


def attachments(model: Any) -> tuple[Attachment, ...]:
    """Everything that is attached to a model."""
    site = _sites.get(unwrap(model))
    return site.attachments if site else ()
