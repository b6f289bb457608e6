"""The documentation is true: blocks run as printed, laws name the properties that hold them, commands exist."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

import stage
import walk
from documents import LANGUAGES, PAGES, ROOT, blocks, docstring_files, language, parse

NOT_RUN = {
    "README.md": 1,
    "docs/attacks.md": 1,
    "docs/how-to/imagenet.md": 1,
    "docs/how-to/own-photos.md": 2,
    "docs/index.md": 2,
    "docs/lmms-eval.md": 2,
    "docs/paper-scale.md": 2,
    "docs/reproduction.md": 1,
    "docs/training.md": 1,
    "docs/words.md": 1,
    "src/sauce_hooks/reproduce/paper.py": 1,
}
"""How many blocks of a page are only checked. One more is a decision, and stands here."""
LONG = {"README.md", "docs/attacks.md", "docs/baselines.md", "docs/lasting.md", "docs/concepts.md", "docs/training.md"}
"""Pages that take more than a few seconds."""
WALKED = "docs/walk.md"
"""Done by `make walk`, in an environment as a newcomer has it."""
WITH_BLOCKS = [page for page in (*PAGES, *docstring_files()) if page != WALKED and blocks(page)]


# Blocks. --------------------------------------------------------------------------------------------------------------


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
    stage.be_brief(monkeypatch)
    return tmp_path / "home"


@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.slow] if p in LONG else []) for p in WITH_BLOCKS])
def test_every_block_runs_as_printed(page, home):
    stage.run(page, home)


@pytest.mark.parametrize("page", WITH_BLOCKS)
def test_every_block_says_what_it_is(page):
    assert [language(region) for region, _ in blocks(page) if language(region) not in LANGUAGES] == []


def test_what_is_not_run_is_marked_with_a_reason_and_counted():
    marked = {page: [reason for _, reason in blocks(page) if reason is not None] for page in WITH_BLOCKS}
    assert {page: len(reasons) for page, reasons in marked.items() if reasons} == NOT_RUN
    assert all(reason.strip() for reasons in marked.values() for reason in reasons)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("```python\n1 / 0\n```\n", ZeroDivisionError),
        ("```python\nprint(2)\n```\n\n```text\n3\n```\n", AssertionError),
        ("```text\nwhose?\n```\n", AssertionError),
        ("```\nls\n```\n", AssertionError),
        ("```sh\nrm -r .\n```\n", AssertionError),
        ("<!-- not run: long -->\n```sh\nsauce-hooks tabel\n```\n", AssertionError),
        ("<!-- not run: long -->\n```sh\nsauce-hooks table --outt x\n```\n", Exception),
        ("<!-- not run: long -->\n```sh\nmake tea\n```\n", AssertionError),
        ("<!-- not run: long -->\n```sh\npip install 'sauce-hooks[tea]'\n```\n", AssertionError),
        ("<!-- not run: long -->\n```sh\npython -m sauce_hooks.scenes.rivals --tea\n```\n", Exception),
        ("<!-- not run: long -->\n```python\nif\n```\n", SyntaxError),
    ],
)
def test_what_is_wrong_on_a_page_is_noticed(text, wrong, tmp_path):
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(wrong):
        for example in parse(str(tmp_path / "page.md")):
            example.evaluate()


def test_what_is_right_on_a_page_passes(tmp_path):
    marked = (
        "<!-- not run: long -->\n```sh\nmake test ARGS=-x\npip install 'sauce-hooks[dev]'\nsauce-hooks table --out x\n```\n"
    )
    page = f"```python\nprint(1 + 1)\n```\n\n```text\n2\n```\n\n{marked}"
    (tmp_path / "page.md").write_text(page)
    for example in parse(str(tmp_path / "page.md")):
        example.evaluate()


def test_the_walk_stops_where_something_else_is_shown_than_its_page_says(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("```sh\necho one\n```\n\n```text\n...ne\n```\n\n```sh\ntrue\n```\n")
    walk.walk(page)
    assert capsys.readouterr().out.count("as it should") == 2
    for wrong in ("echo two", "echo one; false"):
        page.write_text(f"```sh\n{wrong}\n```\n\n```text\none\n```\n")
        with pytest.raises(SystemExit, match="step 1 does not do what it says"):
            walk.walk(page)
    page.write_text("```python\nx = 1\n```\n\n```python\nprint(x)\n```\n\n```text\n1\n```\n")
    walk.run_program(page, None)
    page.write_text("```python\nprint(2)\n```\n\n```text\n1\n```\n")
    with pytest.raises(SystemExit, match="program 1 prints"):
        walk.run_program(page, None)


def test_no_code_hides_in_indentation():
    from markdown_it import MarkdownIt

    for page in PAGES:
        tokens = MarkdownIt().enable("table").parse((ROOT / page).read_text(encoding="utf-8"))
        assert [token.content for token in tokens if token.type == "code_block"] == [], page


# Laws. ----------------------------------------------------------------------------------------------------------------

REFERENCE = re.compile(r"tests/(\w+\.py)(?:::(\w+))?")


@cache
def functions_in(file: str) -> dict[str, ast.FunctionDef]:
    found = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name: node for node in ast.walk(found) if isinstance(node, ast.FunctionDef)}


def is_property(file: str, name: str) -> bool:
    """Whether hypothesis makes up its examples."""
    called = [d.func for d in functions_in(file)[name].decorator_list if isinstance(d, ast.Call)]
    return any(isinstance(f, ast.Name) and f.id == "given" for f in called)


def laws() -> list[tuple[str, str, str]]:
    """Page, law and what stands in its column `property`, of every table of laws; and every paragraph that is one."""
    found: list[tuple[str, str, str]] = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|\n"))] for line in table.splitlines()]
            if "law" in rows[0]:
                assert "property" in rows[0], f"{page}: a table of laws without a column `property`"
                column = rows[0].index("property")
                found += [(page, row[0], row[column]) for row in rows[2:]]
        found += [(page, part[:60], part) for part in re.split(r"\n\s*\n", text) if part.startswith("**Law")]
    return found


def test_every_law_names_a_property_that_holds_it():
    assert {law for page, law, _ in laws() if page == "docs/method.md"} == {
        "Null edit", "Clean exit", "Never silent", "Union", "Locality", "Sparse equals dense", "Rows are independent",
        "Round trips", "Any dtype",
    }  # fmt: skip
    for page, law, said in laws():
        named = [(file, name) for file, name in REFERENCE.findall(said) if name]
        assert named, f"{page}: the law {law!r} names no property"
        for file, name in named:
            assert name in functions_in(file), f"{page}: there is no {name} in tests/{file}"
            assert is_property(file, name), f"{page}: {name} in tests/{file} is no property of hypothesis"


def test_every_test_that_the_documentation_names_exists():
    for page in PAGES:
        for file, name in REFERENCE.findall((ROOT / page).read_text(encoding="utf-8")):
            assert (ROOT / "tests" / file).is_file(), f"{page}: tests/{file}"
            assert not name or name in functions_in(file), f"{page}: {name} in tests/{file}"
