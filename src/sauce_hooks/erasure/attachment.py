"""One edit on one model, as a record: what, where, for whom, and what came of it."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from sauce_hooks.erasure.merging import Edit, MergedEdit
from sauce_hooks.hookpoint import HookPoint

if TYPE_CHECKING:
    from sauce_hooks.erasure.site import Site

Scope = Literal["model", "task"]

of_this_task: ContextVar[tuple[Attachment, ...]] = ContextVar("sauce_hooks_erasers", default=())
"""What the running thread or task has put on with scope "task"."""


@dataclass(eq=False)
class Attachment:
    """One edit on one model; what `attach` gives and `detach` takes."""

    hook_point: HookPoint
    edit: Edit
    rows: tuple[Edit, ...] | None = None
    """An edit for each row of a batch, besides `edit`."""
    sizes: tuple[int, ...] | None = None
    """How many images (tiles, or patches where they are packed) each row has; None: it follows from the batch, as it
    always does at a language layer."""
    scope: Scope = "model"
    allow_bypass: bool = False
    """The user knows that the language side also reads what this edit does not reach."""
    images_seen: int = 0
    """Calls of the model, or of its `generate`, that had images."""
    tower_runs: int = 0
    """Forwards of the tower since it was attached."""
    edits_run: int = 0
    """How often the edit ran."""
    problem: str | None = None
    """Why an edit did not take effect, once that is known."""
    site: Site | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.is_null = all(MergedEdit([edit]).is_null for edit in (self.edit, *(self.rows or ())))
        self.looks_for_images = self.hook_point.place == "language" and self.edit.tokens == "patches"
        """Whether what is edited are the image's positions in a text."""

    @property
    def active(self) -> bool:
        """Whether it is attached."""
        return self.site is not None and self in self.site.attachments

    @property
    def proven(self) -> bool:
        """Whether the language side was seen to get something else because of the block's output."""
        return self.site is not None and self.site.is_proven(self.hook_point)

    @property
    def is_of_this_task(self) -> bool:
        """Whether the running thread or task put it on, with scope "task"."""
        return self in of_this_task.get()
