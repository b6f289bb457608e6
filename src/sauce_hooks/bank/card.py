"""A model card from the facts: what is known stands there, what is not known is left out.

Names and texts come from anybody. They are escaped, so that they stand there as they are and do nothing.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Iterable, Sequence

from sauce_hooks.bank.format import library_version
from sauce_hooks.bank.records import Concept, Effect, Rate, SAERecord

BANK_CARD = "<!-- sauce_hooks: card of a concept bank -->"
LONGEST = 80
"""Characters of a text that are shown."""
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
"""Control characters, among them those that turn the direction of what follows, and ends of lines."""
_BEHAVES = (
    "An erasure is no deletion. The concept is still in the model's weights: not deleted, only not accessible through this "
    "model while the eraser is on. With the eraser off, the model is as it was."
)


def escaped(text: str) -> str:
    """Any text as Markdown that shows it, on one line, cut where it is long."""
    seen = _UNSEEN.sub("�", text if len(text) <= LONGEST else text[: LONGEST - 1] + "…")
    return "".join("\\" + letter if letter in string.punctuation else letter for letter in seen.strip()) or "*(empty)*"


def front_matter(license: str | None, tags: Iterable[str]) -> str:
    """What the hub reads of a card."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(license=license, library_name="sauce_hooks", tags=["sparse-autoencoder", *tags])
    return f"---\n{data.to_yaml()}\n---"


def code(*lines: str) -> str:
    """A block of Python. Its fence is longer than any in it."""
    text = "\n".join(lines)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}python\n{text}\n{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts that are Markdown already; columns in which nothing stands are left out."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line[i] for i in kept) + " |" for line in lines)


def concepts_section(concepts: Sequence[Concept]) -> str:
    """The concepts in a table, with what erasing them was measured to do."""
    rows = [
        (
            escaped(c.name),
            str(len(c.features)),
            "" if c.gamma is None else f"{c.gamma:g}",
            "" if c.edit is None else escaped(c.edit),
            "" if c.effect is None else figures(c.effect),
            "" if c.effect is None else escaped(c.effect.images),
        )
        for c in concepts
    ]
    listing = table(["concept", "features", "γ", "edit", "measured effect (95% interval)", "measured on"], rows)
    n = f"{len(concepts):,} concept{'' if len(concepts) == 1 else 's'}."
    return f"## Concepts\n\n{n}\n\n{listing}" if rows else "## Concepts\n\nNone yet."


def figures(effect: Effect) -> str:
    """With the concept erased; in brackets the same of the model as it is, where that is known."""
    parts = [
        f"{escaped(name)} {_rate(rate)}" + (f" [before: {_rate(effect.original[name])}]" if name in effect.original else "")
        for name, rate in effect.figures.items()
        if not math.isnan(rate.value)
    ]
    return "; ".join(parts)


def _rate(rate: Rate) -> str:
    interval = "" if math.isnan(rate.low) or math.isnan(rate.high) else f" ({rate.low:.3f} to {rate.high:.3f})"
    return f"{rate.value:.3f}{interval}, n = {rate.n:,}"


def closing() -> str:
    """What an erasure is not, and what wrote this."""
    return f"## What an erasure is not\n\n{_BEHAVES}\n\nWritten by sauce_hooks {library_version()}."


def bank_card(
    concepts: Sequence[Concept], sae: SAERecord | None, repo_id: str, *, sae_id: str | None, license: str | None
) -> str:
    """The card of a bank that stands without its SAE.

    Args:
        concepts: what is in it.
        sae: the SAE the features are of, if that is known.
        repo_id: where it will lie.
        sae_id: where that SAE lies, if that is known.
        license: as the hub calls it; left out if nobody said.
    """
    facts = [
        "Named concepts as features of a sparse autoencoder (SAE) of a vision-language model, to be erased from what the "
        "model sees. The SAE is not in this repository."
    ]
    if sae is not None:
        facts.append(
            f"The features are of one SAE: {escaped(sae.architecture)}, {sae.d_sae:,} features of a residual stream "
            f"{sae.d_in:,} wide, at `{in_code(sae.hook_point)}`. Beside any other the bank is refused."
        )
    where = repr(sae_id) if sae_id else '"the folder or repository of that SAE"'
    some = concepts[0].name if concepts else "a concept"
    use = code(
        f"sae = sauce_hooks.VisionSAE.load({where})",
        f"sae.concepts |= sauce_hooks.ConceptBank.load({repo_id!r})",
        f"with sauce_hooks.ConceptEraser(model, sae, [{some!a}]):",
        "    model.generate(**inputs)",
    )
    return "\n\n".join(
        [front_matter(license, ["concept-erasure"]), BANK_CARD, "# Concept bank", *facts, "## Use", use,
         concepts_section(concepts), closing()]
    ) + "\n"  # fmt: skip


def in_code(text: str) -> str:
    """What can stand between backticks."""
    return _UNSEEN.sub("�", text).replace("`", "'").replace("|", "¦")
