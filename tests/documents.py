"""The documentation's code blocks, read by Sybil: what runs as printed, what is checked only, and what it is run on.

A page is one program: its blocks share names and run in order, in an empty folder. `stage.py` says what is there already.

A block that cannot run here (an hour, eight GPUs, an installation) stands behind a comment that no reader sees:

    <!-- not run: installs packages -->

It is still checked: Python compiles, and of a command the program, the verb and every option exist.
A block of `text` behind one that runs is what that prints; "..." stands for anything. Where a page shows another way to
do the same, `<!-- anew -->` before it clears the folder away: what the first way wrote is not in the second's.
"""

from __future__ import annotations

import argparse
import contextlib
import doctest
import importlib
import io
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from sybil import Document, Example, Region, Sybil
from sybil.document import PythonDocStringDocument
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer, RawFencedCodeBlockLexer

ROOT = Path(__file__).parents[1]
PAGES = tuple(path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))))
_COMPARE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Docstrings(PythonDocStringDocument):
    """Docstrings, run by a reader of them, who has not the module's own names."""

    def __init__(self, text: str, path: str) -> None:
        Document.__init__(self, text, path)


# Commands. ------------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """The words of each command in a block; comments and lines continued with a backslash are understood."""
    return [words for line in text.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def _sauce_hooks(words: Sequence[str]) -> tuple[Any, list[str]]:
    """The verb of a command line, and what is given to it."""
    import typer

    from sauce_hooks.cli import app

    verb: Any = typer.main.get_command(app)
    rest = list(words)
    while hasattr(verb, "commands"):
        assert rest and rest[0] in verb.commands, f"no such verb: {' '.join(words)}"
        verb = verb.commands[rest.pop(0)]
    return verb, rest


def check_sauce_hooks(words: Sequence[str]) -> None:
    """That the verb and its options exist and nothing is missing, by the command line's own parser. Runs nothing."""
    verb, given = _sauce_hooks(words)
    _parse(verb, given)


def _parse(verb: Any, given: Sequence[str]) -> None:
    """Arguments without looking at the files they name."""
    from typer.core import TyperCommand

    assert isinstance(verb, TyperCommand)
    context = verb.make_context(verb.name, list(given), resilient_parsing=True)
    context.resilient_parsing = False  # from here on what is wrong is said
    values, left, _ = verb.make_parser(context).parse_args(list(given))
    assert not left, f"{verb.name}: too much: {left}"
    missing = [p.name for p in verb.params if p.required and values.get(p.name) in (None, (), [])]
    assert not missing, f"{verb.name}: {missing} not given"


def run_sauce_hooks(words: Sequence[str]) -> None:
    """Run it, in this process."""
    from typer.testing import CliRunner

    from sauce_hooks.cli import app

    found = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert found.exit_code == 0, f"sauce-hooks {' '.join(words)}: exit code {found.exit_code}\n{found.output}"
    print(found.stdout, end="")


def check_make(words: Sequence[str]) -> None:
    """That the targets exist."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, assigned, _ = word.partition("=")
        pattern = rf"^{name} \?=" if assigned else rf"^{name}:"
        assert re.search(pattern, makefile, re.MULTILINE), f"the Makefile has no {name}"


def check_pip(words: Sequence[str]) -> None:
    """That what is installed of ours has the extras it is asked for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert words[0] == "install", words
    for word in words[1:]:
        if found := re.fullmatch(r"(?:sauce[-_]hooks|\.)(?:\[([\w,-]+)\])?", word):
            extras = set(filter(None, (found[1] or "").split(",")))
            unknown = extras - set(project["optional-dependencies"])
            assert not unknown, f"pyproject.toml has no extra {unknown}"


class _Parsed(Exception):
    """A program has read its arguments, and need not go on."""


def check_module(words: Sequence[str]) -> None:
    """That a program `python -m MODULE` exists and takes these arguments."""
    import typer

    name, *given = words
    if name == "sauce_hooks":
        return check_sauce_hooks(given)
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    if "argparse" in Path(str(module.__file__)).read_text(encoding="utf-8"):
        return _argparse(module, given)
    app = typer.Typer()
    app.command()(module.main)
    return _parse(typer.main.get_command(app), given)


def _argparse(module: Any, given: Sequence[str]) -> None:
    real = argparse.ArgumentParser.parse_args

    def parse(self: Any, args: Any = None, namespace: Any = None) -> Any:
        real(self, list(given), namespace)
        raise _Parsed

    argparse.ArgumentParser.parse_args = parse
    try:
        with contextlib.suppress(_Parsed):
            module.main()
    finally:
        argparse.ArgumentParser.parse_args = real


def check_python(words: Sequence[str]) -> None:
    """A module, or a script of this repository whose options stand in it."""
    if words[0] == "-m":
        return check_module(words[1:])
    script, *given = words
    source = (ROOT / script).read_text(encoding="utf-8")
    for option in (word for word in given if word.startswith("--")):
        assert f'"{option}"' in source, f"{script} has no {option}"
    return None


def check_torchrun(words: Sequence[str]) -> None:
    """What it starts."""
    check_module(words[words.index("-m") + 1 :])


def check_accelerate(words: Sequence[str]) -> None:
    """What it launches."""
    assert words[0] == "launch", words
    check_torchrun(words)


def check_lmms_eval(words: Sequence[str]) -> None:
    """That our model takes these arguments; the others are lmms-eval's own."""
    from sauce_hooks.lmms.settings import Settings

    given = dict(pairwise(words))
    assert given["--model"] == "sauce", words
    Settings.read(dict(argument.split("=", 1) for argument in given["--model_args"].split(",")))


def run_module(words: Sequence[str]) -> None:
    """`python -m MODULE`, in this process."""
    import runpy

    assert words[0] == "-m", words
    argv = sys.argv
    sys.argv = list(words[1:])
    try:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, f"python {' '.join(words)}: exit code {end.code}"
    finally:
        sys.argv = argv


CHECKS: Mapping[str, Callable[[Sequence[str]], None]] = {
    "sauce-hooks": check_sauce_hooks,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "torchrun": check_torchrun,
    "accelerate": check_accelerate,
    "lmms-eval": check_lmms_eval,
}
RUNS: Mapping[str, Callable[[Sequence[str]], None]] = {"sauce-hooks": run_sauce_hooks, "python": run_module}


def _each(text: str, programs: Mapping[str, Callable[[Sequence[str]], None]]) -> None:
    for words in commands(text):
        while "=" in words[0]:  # a variable of the environment
            words.pop(0)
        assert words[0] in programs, (
            f"{words[0]!r} is not among {', '.join(programs)}: mark the block as not run, or teach it"
        )
        programs[words[0]](words[1:])


# Blocks. --------------------------------------------------------------------------------------------------------------


class _Printing:
    """Keeps what a block prints, for a block of `text` behind it."""

    def __init__(self, inner: Callable[[Example], Any]) -> None:
        self.inner = inner

    def __call__(self, example: Example) -> None:
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                self.inner(example)
        finally:
            example.document.printed = out.getvalue()  # type: ignore[attr-defined]


def _printed(example: Example) -> str | None:
    printed = getattr(example.document, "printed", None)
    assert printed is not None, "text, but no block before it that runs: what is it the output of?"
    if not doctest.OutputChecker().check_output(str(example.parsed), printed, _COMPARE):
        return f"it prints\n{printed}\nand not\n{example.parsed}"
    return None


def _json(example: Example) -> None:
    found = json.loads(str(example.parsed))
    example.document.shown = [*getattr(example.document, "shown", []), found]  # type: ignore[attr-defined]


def _nothing(example: Example) -> None:
    del example


LANGUAGES: Mapping[str, Callable[[Example], Any]] = {
    "python": _Printing(PythonEvaluator()),
    "sh": _Printing(lambda example: _each(str(example.parsed), RUNS)),
    "json": _json,
    "text": _printed,
}
"""How a block runs."""
UNRUN: Mapping[str, Callable[[Example], Any]] = {
    "python": lambda example: compile(str(example.parsed), example.path, "exec") and None,
    "sh": lambda example: _each(str(example.parsed), CHECKS),
    "json": _json,
    "text": _nothing,
}
"""How a block is checked that does not."""


def language(region: Region) -> str | None:
    """Of a block; None of a mark."""
    return region.lexemes.get("language")


def _unrun(example: Example) -> Any:
    example.document.pop_evaluator(_unrun)
    example.document.printed = None  # type: ignore[attr-defined]
    return UNRUN[example.region.lexemes["language"]](example)


def _mark(example: Example) -> None:
    example.document.push_evaluator(_unrun)


def _anew(example: Example) -> None:
    example.document.anew()  # type: ignore[attr-defined]


_MARKS: Mapping[str, Callable[[Example], Any]] = {"not run": _mark, "anew": _anew}


def _parse_marks(document: Document) -> Iterator[Region]:
    for name, evaluator in _MARKS.items():
        for region in DirectiveInHTMLCommentLexer(name)(document):
            region.parsed, region.evaluator = region.lexemes["arguments"].strip(), evaluator
            yield region


def _parse_blocks(document: Document) -> Iterator[Region]:
    for region in RawFencedCodeBlockLexer(re.compile(r"(?P<language>[^\n]*)$\n", re.MULTILINE))(document):
        name = region.lexemes["language"]
        region.parsed = region.lexemes["source"]
        region.evaluator = LANGUAGES.get(name, _strange)
        yield region


def _strange(example: Example) -> str:
    return f"a block of {example.region.lexemes['language']!r}: write one of {', '.join(LANGUAGES)} behind the fence"


SYBIL = Sybil([_parse_marks, _parse_blocks], document_types={".py": Docstrings})


@cache
def docstring_files() -> tuple[str, ...]:
    """Modules with blocks in their docstrings."""
    paths = sorted((ROOT / "src").rglob("*.py"))
    return tuple(path.relative_to(ROOT).as_posix() for path in paths if list(SYBIL.parse(path)))


def parse(page: str) -> Document:
    """A page or module."""
    return SYBIL.parse(ROOT / page)


def blocks(page: str) -> list[tuple[Region, str | None]]:
    """The blocks of a page, each with the reason why it is not run, if it is not."""
    found: list[tuple[Region, str | None]] = []
    reason = None
    for example in parse(page):
        if example.region.lexemes.get("directive") == "anew":
            continue
        if language(example.region) is None:
            assert reason is None, f"{page}:{example.line}: two marks and no block between them"
            reason = example.parsed
        else:
            found.append((example.region, reason))
            reason = None
    assert reason is None, f"{page}: a mark and no block behind it"
    return found
