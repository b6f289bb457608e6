"""Room 5: the pure tensor edit, its attachment to a model, `ConceptEraser`. Concepts go in, a changed forward comes out."""

from sauce_hooks.erasure.attach import attach, attachments, check_ran, detach
from sauce_hooks.erasure.attachment import Attachment
from sauce_hooks.erasure.bake import bake, erasures
from sauce_hooks.erasure.baked_files import from_pretrained
from sauce_hooks.erasure.eraser import PAPER_GAMMA, ConceptEraser, merge
from sauce_hooks.erasure.merging import Edit, MergedEdit
from sauce_hooks.erasure.rules import EDITS, Rule
from sauce_hooks.erasure.several import Erasers, ErasersStatus
from sauce_hooks.erasure.status import EraserStatus

__all__ = [
    "EDITS",
    "PAPER_GAMMA",
    "Attachment",
    "ConceptEraser",
    "Edit",
    "EraserStatus",
    "Erasers",
    "ErasersStatus",
    "MergedEdit",
    "Rule",
    "attach",
    "attachments",
    "bake",
    "check_ran",
    "detach",
    "erasures",
    "from_pretrained",
    "merge",
]
