"""A newcomer's walk, by the front page alone: `make walk` does every step of docs/walk.md and looks at what it shows.

Only Python's own library: on a fresh machine nothing else is there before the first step. A step is a block of `sh`, run
in the root of the repository with the environment's programs in reach; the block of `text` behind it is what it must
show, where "..." stands for anything. `python tests/walk.py --program PAGE` runs the Python of another page, and looks at
what it prints in the same way: so a step can do what that page says.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """Code of a page, and what it must show."""

    language: str
    code: str
    shown: str | None


def blocks(page: str, *languages: str) -> Iterator[Block]:
    """Those of these languages, each with the `text` that follows it."""
    found = [(match[1], match[2]) for match in _BLOCK.finditer(page)]
    for (language, code), (following, text) in zip(found, [*found[1:], ("", "")], strict=True):
        if language in languages:
            yield Block(language, code, text if following == "text" else None)


def differs(wanted: str | None, shown: str) -> bool:
    """Whether something else was shown than what a page says; how it is spaced does not count."""
    if wanted is None:
        return False
    parts = [re.escape(" ".join(part.split())) for part in wanted.split("...")]
    return re.fullmatch(".*".join(parts), " ".join(shown.split())) is None


def walk(page: Path) -> None:
    """Every step, until one shows something else; what it took."""
    programs = Path(os.environ.get("VENV", ROOT / ".venv")).absolute() / "bin"
    own = {
        name: value for name, value in os.environ.items() if not name.startswith("MAKE")
    }  # a newcomer's make is no part of ours
    environment = {**own, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "120"}
    began = time.monotonic()
    for number, step in enumerate(blocks(page.read_text(encoding="utf-8"), "sh"), 1):
        start = time.monotonic()
        print(f"{number:>2}. {step.code.strip()}", flush=True)
        done = subprocess.run(
            step.code, shell=True, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if differs(step.shown, done.stdout) or (done.returncode and "exit code" not in step.code):
            print(f"{done.stdout}\n(exit code {done.returncode})\nand not what the page says:\n{step.shown or ''}")
            raise SystemExit(f"{page}: step {number} does not do what it says")
        print(f"    as it should, {time.monotonic() - start:.0f} s", flush=True)
    print(f"the whole walk: {(time.monotonic() - began) / 60:.1f} minutes", flush=True)


def run_program(page: Path, number: int | None) -> None:
    """One program of a page, or all of them one after the other; ends with an error if one prints something else."""
    names: dict[str, object] = {"__name__": "__main__"}
    for i, block in enumerate(blocks(page.read_text(encoding="utf-8"), "python"), 1):
        if number not in (None, i):
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block.code, f"{page}, program {i}", "exec"), names)
        print(printed.getvalue(), end="")
        if differs(block.shown, printed.getvalue()):
            raise SystemExit(f"{page}: program {i} prints the above, and not\n{block.shown}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, nargs="?", default=ROOT / "docs" / "walk.md")
    parser.add_argument("--program", action="store_true", help="run the page's Python instead")
    parser.add_argument("--number", type=int, help="of its programs this one only, counted from 1")
    given = parser.parse_args()
    if given.program:
        run_program(given.page, given.number)
    else:
        walk(given.page)


if __name__ == "__main__":
    main()
