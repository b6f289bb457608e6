"""The page: what is said of two answers is true of them, and one file is all there is."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sauce_hooks.report import compare_words, tidy, write_page

words = st.lists(st.sampled_from(["a", "red", "tiger", "cat", "and", ",", "thing", "."]), max_size=12).map(" ".join)


@given(before=words, after=words)
def test_the_pieces_make_up_both_answers(before, after):
    pieces = compare_words(before, after, ["red", "tiger"], ["red", "cat"])
    old = "".join(p.lead + p.text for p in pieces if p.change != "new")
    new = "".join(p.lead + p.text for p in pieces if p.change in ("same", "remembered", "new"))
    assert re.findall(r"\w+|[^\w\s]", old) == before.split()
    assert re.findall(r"\w+|[^\w\s]", new) == after.split()


def test_a_word_is_forgotten_lost_remembered_or_new():
    pieces = compare_words("a red tiger and a cat.", "a brown tiger and a dog.", ["red", "tiger"], ["red", "tiger", "cat"])
    fates = {piece.text.rstrip("."): piece.change for piece in pieces}
    assert fates["red"] == "forgotten"
    assert fates["tiger"] == "remembered"
    assert fates["cat"] == "lost"
    assert fates["brown"] == fates["dog"] == "new"


def test_tidy_writes_as_people_do():
    assert tidy("a  red car , and a cat .") == "a red car, and a cat."


@pytest.mark.slow
def test_the_demo_page_needs_nothing_but_itself_and_escapes_what_it_shows(tmp_path):
    from sauce_hooks.scenes.demo import content

    page = content(quick=True)
    hostile = '<script>alert("x")</script>'
    page = replace(page, cards=(replace(page.cards[0], after=hostile), *page.cards[1:]))
    html = write_page(page, tmp_path / "page.html").read_text(encoding="utf-8")
    assert hostile not in html
    assert not re.findall(r"""(?:src|href)=["']?(?!data:|#)[^"'>\s]+""", html)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    for concept in page.erased:
        assert concept in html
