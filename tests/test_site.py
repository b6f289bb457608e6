"""The site: the front page says what the model says now, every page is in its menu, and reading it fetches nothing."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from sauce_hooks import scenes

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CONFIG: Any = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pictures() -> Iterator[Any]:
    """The script that makes them."""
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["pictures"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["pictures"]


def test_the_front_pages_show_what_the_model_says_now(pictures):
    shown = pictures.ask(*scenes.load())
    for page, assets in pictures.PAGES.items():
        assert pictures.written(page.read_text(encoding="utf-8")) == pictures.table(shown, assets)
    for i, one in enumerate(shown):
        drawn = np.asarray(one.scene.image, dtype=float)
        kept = np.asarray(Image.open(DOCS / "assets" / f"scene-{i}.png").convert("RGB"), dtype=float)
        assert kept.shape == drawn.shape
        assert np.abs(kept - drawn).mean() < 10  # few colours


def test_the_pictures_are_small():
    assert sum(path.stat().st_size for path in (DOCS / "assets").iterdir()) < 150_000


def _pages(menu: Any) -> Iterator[str]:
    for entry in menu:
        for to in entry.values():
            yield from (to,) if isinstance(to, str) else _pages(to)


def test_every_page_is_in_the_menu_once():
    listed = list(_pages(CONFIG["nav"]))
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_reading_the_site_fetches_nothing():
    assert CONFIG["theme"]["font"] is False
    assert not [file for file in (*CONFIG.get("extra_css", ()), *CONFIG.get("extra_javascript", ())) if "//" in file]
    for page in DOCS.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"!\[[^]]*\]\(https?:|<(?:img|script|link|iframe)\b[^>]*https?:", text), page
