"""The scripts in examples/ run, print what they promise, stay short and open as notebooks."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

PRINTED = {
    "quickstart.py": r"before: .*tiger.*\nerased: (?!.*tiger).*\nafter: +.*tiger",
    "own_model.py": r"before: a tiger affirmed in (9|10) of 10 .*\nerased: a tiger affirmed in [0-5] of 10",
    "contrast_from_folders.py": r"(?s)tuned: .*24 images of tiger.*UA_d +\d+% .*saved: +tiger\n",
    "merging.py": r"merged, stacked and named at once are equal: True\n",
    "serving.py": r"forget nothing: .*tiger.*\nforget red: (?!.*\bred\b).*tiger.*\nforget tiger: (?!.*tiger).*",
    "nnsight_trace.py": r"equal to the context manager's: True\nafterwards as before: True",
    "baselines.py": r"(?s)UA_d.*(?=.*GD)(?=.*SAUCE)(?=.*difference of means)(?=.*prompt only)(?=.*original model)",
}
"""By script, what its output must show."""
LONG = {"own_model.py", "contrast_from_folders.py", "baselines.py"}
"""Those that train or tune."""
APART = {"serving.py"}
"""In a process of its own: nnsight, once imported, gives every object a `save`, which breaks a server's lazy imports."""
NEEDS = {"serving.py": ("fastapi", "httpx2"), "baselines.py": ("peft",)}


def output_of(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    if name not in APART:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in sorted(PRINTED)])
def test_it_runs_and_shows_what_it_says(name, tmp_path, monkeypatch, capsys):
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module)
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # what a script writes goes there
    printed = output_of(name, capsys)
    assert re.search(PRINTED[name], printed), printed
    assert not list(here.iterdir())


def test_every_script_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PRINTED)


@pytest.mark.parametrize("name", sorted(PRINTED))
def test_it_is_short_says_what_it_shows_and_opens_as_a_notebook(name):
    lines = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) < 70
    assert lines[0] == "# %% [markdown]" and re.fullmatch(r"# # \w.+", lines[1]) and re.fullmatch(r"# [A-Z].+", lines[2])
    assert "# %%" in lines
