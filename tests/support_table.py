"""The support table: what an eraser does in a tiny model of every family, measured, and written to docs/families.md.

    python tests/support_table.py        (or `make families`)

`Subject` holds one family's model and what came of erasing in it. test_families.py holds these against the laws, and
the table says what was measured, so the two cannot disagree.
"""

from __future__ import annotations

import copy
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import families as truth
from sauce_hooks import ConceptEraser, VisionSAE, find_hook_point
from sauce_hooks.erasure import EraserStatus
from sauce_hooks.errors import EditError, HookPointError
from sauce_hooks.hookpoint import FAMILIES, HookPoint, Reads, TokenPolicy, find_towers
from tiny import D_SAE, make_sae

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
EFFECT = 1e-3
"""Logits that differ by more were changed by the edit."""

TIMM = ("perception_lm", "gemma3n", "fast_vlm")
"""Their towers are timm's, which the tests do without."""
REFUSED = tuple(name for name, spec in truth.FAMILIES.items() if spec.blocks is None)
SUPPORTED = tuple(name for name in truth.FAMILIES if name not in REFUSED)
GENERATING = tuple(n for n in SUPPORTED if truth.FAMILIES[n].kind == "vlm" and truth.FAMILIES[n].generate)

EVERYTHING = range(D_SAE)
"""All features: an erasure that nothing could hide."""


class Subject:
    """A tiny model of one family, its inputs, its default hook point, and what erasing there gives; each made once."""

    def __init__(self, name: str) -> None:
        self.name, self.spec = name, truth.FAMILIES[name]
        self.pristine, self.inputs = truth.build(name)
        # Images go through the first tower; one builder's inputs are a video, which goes through the other.
        is_first = find_towers(self.pristine)[0].path == self.spec.tower
        self.point = find_hook_point(self.pristine, None if is_first else self.path(-2))
        self.sae = make_vision_sae(self.point)

    def path(self, block: int) -> str:
        """The path of a block, from the end if negative."""
        return truth.block_path(self.pristine, self.name, block)

    def cold(self) -> Any:
        """A model that has never run."""
        return copy.deepcopy(self.pristine)

    def warm(self) -> Any:
        """One that has: transformers' hooks that record hidden states are in it."""
        model = self.cold()
        truth.score(model, self.inputs)
        return model

    def score(self, model: Any) -> Tensor:
        return truth.score(model, self.inputs)

    def eraser(self, model: Any, features: Any = EVERYTHING, sae: VisionSAE | None = None, **options: Any) -> ConceptEraser:
        """An eraser of all features, of some, or (`features=None`) of none."""
        # The hybrid's images go through two towers at once: an erasure in one of them is a partial one.
        options = {"allow_bypass": self.name == "deepseek_vl_hybrid", "gamma": -3.0, **options}
        return ConceptEraser(model, sae or self.sae, [] if features is None else [features], **options)

    @cached_property
    def bare(self) -> Tensor:
        return self.score(self.cold())

    @cached_property
    def erased_cold(self) -> tuple[Tensor, EraserStatus]:
        return self._erased(self.cold())

    @cached_property
    def erased_warm(self) -> tuple[Tensor, EraserStatus]:
        return self._erased(self.warm())

    def _erased(self, model: Any) -> tuple[Tensor, EraserStatus]:
        with self.eraser(model) as eraser:
            return self.score(model), eraser.status()

    @cached_property
    def generated(self) -> Tensor:
        return self.first_logits(self.cold())

    @cached_property
    def generated_cold(self) -> tuple[Tensor, EraserStatus]:
        return self._generated(self.cold())

    @cached_property
    def generated_warm(self) -> tuple[Tensor, EraserStatus]:
        return self._generated(self.warm())

    def _generated(self, model: Any) -> tuple[Tensor, EraserStatus]:
        with self.eraser(model) as eraser:
            return self.first_logits(model), eraser.status()

    @torch.no_grad()
    def first_logits(self, model: Any) -> Tensor:
        """The logits of the first token that `generate` chooses."""
        inputs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        return model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, **options).logits[0]

    @cached_property
    def rows_follow(self) -> bool:
        """Whether the batch says which part of the tower's batch belongs to which row."""
        try:
            self.erased_by_row()
        except EditError:
            return False
        return True

    def erased_by_row(self, sizes: tuple[int, ...] | None = None) -> Tensor:
        """Everything erased for the first row, nothing for the second."""
        model = self.warm()
        with self.eraser(model, None).for_rows([[EVERYTHING], []], sizes=sizes):
            return self.score(model)

    @cached_property
    def traced(self) -> Tensor:
        """The score of the model under nnsight, erased with `intervene`."""
        from nnsight import NNsight

        model = self.warm()
        traced, eraser = NNsight(model), self.eraser(model)

        def run(**inputs: Any) -> Any:
            with torch.no_grad(), traced.trace(**inputs):
                eraser.intervene(traced)
                output = traced.output.save()
            return output

        return truth.score(run, self.inputs)


@cache
def subject(name: str) -> Subject:
    """A family's subject, one for all tests of a process; skips where a package is missing."""
    return Subject(name)


def make_vision_sae(point: HookPoint, **tokens: Any) -> VisionSAE:
    """A random SAE at a hook point, for the tokens that are named or those that are meant there."""
    return VisionSAE.wrap(make_sae(d_in=point.d_in), point, TokenPolicy(**tokens) if tokens else None)


def far(a: Tensor, b: Tensor) -> bool:
    """Whether two scores differ by more than anything but an edit makes them."""
    return bool((a - b).abs().max() > EFFECT)


# The page. ------------------------------------------------------------------------------------------------------------

INTRO = """# Supported families

What an eraser does in every family of vision-language models, dual encoders and vision towers that transformers has and
sauce_hooks knows. **This page is generated** (`make families`, with transformers {version}): `tests/test_families.py`
builds a tiny model of each family with random weights from its config and holds it against the same laws, and the table
says what came out. A test fails when the two disagree.

What is promised of every family in the tables, and tested:

- **It takes effect.** An erasure changes the logits, to the same ones in a model that has never run (*cold*) and in one
  that has (*warm*, with transformers' recording hooks in it), and in `generate`.
- **Never silently nothing.** At every block an erasure either changes the answer or raises `IneffectiveEraserError`.
- **Nothing goes by.** Nothing that the language side reads comes before the default block.
- **No trace.** An eraser without concepts changes no bit; afterwards the model is the very same one, logits and all, also
  after an exception.
- **Order does not matter.** Erasers nested, reordered and merged give the same bits.
- **Each row its own.** `for_rows` erases in a row what an eraser of its own would, and leaves the other rows' bits alone.
  Where the batch does not say which patches are whose, it raises until it is told (`sizes=`).
- **Reading is faithful.** nnsight reads what the model's own forward computes there, and leaves the model as it was.

Columns: *tokens* is what a block writes, and whether the language side drops the class token (where it reads it, it is
edited too); *read* says which blocks the language side reads; *default* is the block that `find_hook_point(model)` picks;
*rows* says whether `for_rows` needs `sizes=`; *nnsight* says whether `eraser.intervene` in a trace gives the logits that
the hook gives. Where more than one block is read, erasing behind the first needs `allow_bypass=True`.

**Refused** means: the model has no vision tower whose residual stream could be edited. `find_hook_point` raises
`HookPointError` with the reason, and nothing is erased in part or by guess.

A family that is not here is looked for by structure: one module that takes pixels, with one stack of like blocks. If that
is ambiguous, `HookPointError` lists the candidates.
"""

HEAD = """
| family | tower: blocks | tokens | read | default | cold / warm | `generate` | rows | nnsight | notes |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""

SECTIONS = {"vlm": "Vision-language models", "dual": "Dual encoders and heads on them", "vision": "Vision towers alone"}

TOKENS = {
    "batch": "images × tokens",
    "tiles": "tiles or frames × tokens",
    "packed": "patches of all images in a row",
    "packed1": "patches of all images in a row",
    "nhwc": "images × rows × columns",
    "nchw": "images × channels × rows × columns",
}
CLASS = {
    None: "",
    "first": ", class token first",
    "last": ", class token last",
    "first+regs": ", class token and registers first",
}


def row(name: str) -> str:
    """A family's line of the table."""
    spec = truth.FAMILIES[name]
    if name in REFUSED:
        return f"| `{name}` | {_reason(name)} |"
    tower = f"`{spec.tower}`: " if spec.tower else ""
    blocks = f"{tower}`{(spec.blocks or '').removeprefix(f'{spec.tower}.')}`"
    measured = ["—"] * 5 if name in TIMM else _measured(subject(name))
    dropped = name not in TIMM and spec.cls is not None and not subject(name).point.layout.class_read
    notes = [
        "needs timm: tried by hand, not by every run of the tests" if name in TIMM else "",
        "of the last block only the class token is read" if spec.class_only else "",
        spec.notes,
    ]
    tokens = TOKENS[spec.layout] + CLASS[spec.cls] + (" (dropped)" if dropped else "")
    cells = [f"`{name}`", blocks, tokens, _read(name), *measured, "; ".join(filter(None, notes))]
    return f"| {' | '.join(cells)} |"


def _reason(name: str) -> str:
    model, _ = truth.build(name)
    try:
        find_hook_point(model)
    except HookPointError as refusal:
        return str(refusal).partition(". ")[2]
    raise AssertionError(f"{name} is not refused")


def _measured(case: Subject) -> list[str]:
    yes = {True: "yes", False: "**no**"}
    both = [yes[far(scores, case.bare)] for scores, _ in (case.erased_cold, case.erased_warm)]
    generates = yes[far(case.generated_warm[0], case.generated)] if case.name in GENERATING else "—"
    return [
        "penultimate" if case.point.layer == case.point.n_layers - 2 else "first that is read",
        " / ".join(both),
        generates,
        _rows(case),
        yes[torch.equal(case.traced, case.erased_warm[0])],
    ]


def _rows(case: Subject) -> str:
    if not case.rows_follow:
        return "needs `sizes=`"
    return "from the batch" if case.point.layout.even else "from the batch, if its rows have equally many tiles"


def _read(name: str) -> str:
    """Which blocks are read, as the library's own table has it."""
    if name in TIMM:
        return truth.FAMILIES[name].reads
    point = subject(name).point
    places = FAMILIES[point.family].towers if point.family in FAMILIES else ()
    reads = next((place.reads for place in places if place.path == point.tower), Reads())
    named = [f"`{attribute}`" for attribute in (reads.attribute, reads.also) if attribute]
    return " and ".join(named + (["the last"] if reads.and_last or not named else []))


BY_HAND = "## Behind the tower"
"""Where the part of the page begins that is not measured here."""


def page() -> str:
    """The whole page."""
    parts = [INTRO.format(version=transformers.__version__)]
    for kind, title in SECTIONS.items():
        names = [name for name in SUPPORTED if truth.FAMILIES[name].kind == kind]
        parts += [f"\n## {title}\n", HEAD, "\n".join(map(row, names)), "\n"]
    parts += ["\n## Refused\n\n| family | reason |\n| --- | --- |\n", "\n".join(map(row, REFUSED)), "\n"]
    return "".join(parts)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    by_hand = PAGE.read_text(encoding="utf-8").partition(BY_HAND)
    PAGE.write_text(page() + "\n" + "".join(by_hand[1:]), encoding="utf-8")
    print(f"wrote {PAGE}")
