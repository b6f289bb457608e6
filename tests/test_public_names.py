"""What is demanded of every public name: words, shapes, units, errors, a source, and somebody who uses it."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping

import pytest

import public
from documents import PAGES, blocks, docstring_files, language
from public import Public

UNITS: Mapping[str, str] = {
    r"seconds|timeout|pause|\w+_s": r"second",
    r"\w*bytes\w*|keep_in_memory": r"byte|[GMK]iB",
    r"max_cost|price_in|price_out": r"currency|million tokens",
    r"epsilon": r"255|of 1",
    r"image_size|patch_size": r"[Pp]ixel",
    r"\w*share|max_broken": r"[Ss]hare|%",
    r"at_least|at_most_lost": r"share|points|0 to 1",
}
"""Arguments and fields that have a unit, and what says it."""

SOURCES: Mapping[str, str] = {
    # The paper's equations.
    "sauce_score": r"Eq\. 4",
    "select_features": r"Eq\. 5",
    "ConceptEraser": r"Eq\. 6",
    "FeatureStats": r"Eq\. 7.*Eq\. 8",
    "describe_features": r"Eq\. 7.*Eq\. 8|FeatureStats",
    "PAPER_GAMMA": r"Section 4\.1",
    "PRESETS": r"Section 4\.1",
    "PHRASINGS": r"paper",
    # Others' work.
    "learn_projection": r"Belrose|LEACE|arXiv",
    "PROJECTIONS": r"LEACE|arXiv|Belrose",
    "SCORERS": r"SAeUron|paper|Eq\.",
    "EDITS": r"SAeUron|Eq\.|arXiv",
    "Gallery": r"Pach|2504\.02821",
    "OBJECTIVES": r"Yao|arXiv|source",
    "REFUSALS": r"TOFU",
    "pgd": r"Madry|1706\.06083",
    "Rate": r"Wilson",
    "Comparison": r"McNemar|Holm",
    "Agreement": r"Cohen|kappa",
    "CHINESE": r"paper|Table 1",
    "read_out_score": r"Fisher|docs/|read-out",
}
"""Names that carry out what somebody has written down, and how their docstring says who and where."""

NAMES = public.names()
PARTS = [(name, *part) for name in NAMES for part in name.parts]
"""Of each: the public name, what it is called in full, its node and its docstring."""


def of(pattern: str, name: str) -> bool:
    """Whether a name is of a kind."""
    return re.fullmatch(pattern, name) is not None


def test_every_name_says_what_it_is():
    assert [str(name) for name in NAMES if not name.doc.strip()] == []
    assert [f"{n.room}: {q}" for n, q, _, doc in PARTS if not doc and not q.endswith(("__init__", "__call__"))] == []


def test_every_tensor_has_its_shape():
    bare = [f"{n.room}: {q}({a})" for n, q, node, doc in PARTS for a in public.bare_tensors(node) if "shape" not in doc]
    assert bare == []


def test_every_error_that_is_raised_is_named():
    missing = [
        f"{n.room}: {q} raises {error}"
        for n, q, node, doc in PARTS
        for error in sorted(public.own_raises(node))
        if error not in (doc + n.doc if q.endswith("__init__") else doc)
    ]
    assert missing == []


def test_every_quantity_has_its_unit():
    missing = [
        f"{n.room}: {q}({argument}) does not say {wanted}"
        for n, q, node, doc in PARTS
        for argument, said in public.quantities(node, doc or n.doc)
        for kind, wanted in UNITS.items()
        if of(kind, argument) and not re.search(wanted, said)
    ]
    assert missing == []


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_what_is_from_somewhere_says_from_where(name):
    found = [n for n in NAMES if n.name == name]
    assert found, f"{name} is no public name any more"
    assert [n for n in found if re.search(SOURCES[name], n.doc, re.DOTALL)], f"{found[0].doc!r} does not say {SOURCES[name]}"


def used() -> set[str]:
    """What tests, examples and the documentation call, and what they meet through it.

    A type is met where a public name that is used takes, holds or gives it; a helper, where one of its own room calls it.
    """
    seen = set(public.words_used())
    for page in (*PAGES, *docstring_files()):
        for region, _ in blocks(page):
            if language(region) == "python":
                seen |= public.words(ast.parse(str(region.parsed)))
    return public.reached(seen)


def test_every_name_is_used_by_a_test_or_an_example():
    seen = used()
    assert [str(name) for name in NAMES if name.name not in seen] == []


def test_the_front_page_needs_no_detour():
    """What `sauce_hooks` itself exports is called by name, in a test or in the documentation."""
    direct = set(public.words_used())
    for page in PAGES:
        for region, _ in blocks(page):
            if language(region) == "python":
                direct |= public.words(ast.parse(str(region.parsed)))
    assert [n.name for n in NAMES if n.room == "sauce_hooks" and n.name not in direct] == []


def test_the_check_itself_notices():
    """A function that lacks everything fails everything."""
    source = "def f(x: Tensor, timeout: float):\n    raise EditError('no')\n"
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef)
    assert public.bare_tensors(node) == ["x"] and public.own_raises(node) == {"EditError"}
    assert dict(public.quantities(node, "Nothing."))["timeout"] == "Nothing."
    assert isinstance(NAMES[0], Public) and len(NAMES) > 200
