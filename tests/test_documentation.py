"""Every block of the documentation runs as printed."""

from __future__ import annotations

import pytest

import stage
from documents import PAGES, blocks, docstring_files


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("downloads")
    stage.fill_hub(folder)
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch, downloads):
    """An empty folder to be in, a hub, and nobody else on the network."""
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    stage.use_hub(downloads, tmp_path / "uploads", monkeypatch)
    stage.answer_requests(monkeypatch)
    return tmp_path / "home"


WITH_BLOCKS = [page for page in (*PAGES, *docstring_files()) if blocks(page)]


@pytest.mark.parametrize("page", WITH_BLOCKS)
def test_every_block_runs_as_printed(page, home):
    stage.run(page, home)
