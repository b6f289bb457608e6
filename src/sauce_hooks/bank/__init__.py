"""What is known of a concept, as plain data: which features carry it, how strongly to edit them, where that came from.

This room stands beside `errors` under all rooms: an SAE is saved with its bank, the concepts room fills it, the erasure
room reads it.
"""

from sauce_hooks.bank.comparison import BankDiff, ConceptDiff
from sauce_hooks.bank.files import write_text_atomically
from sauce_hooks.bank.mapping import ConceptBank, expanded
from sauce_hooks.bank.records import Concept, CurvePoint, Effect, Projection, Rate, SAERecord, Subspace

__all__ = [
    "BankDiff",
    "Concept",
    "ConceptBank",
    "ConceptDiff",
    "CurvePoint",
    "Effect",
    "Projection",
    "Rate",
    "SAERecord",
    "Subspace",
    "expanded",
    "write_text_atomically",
]
