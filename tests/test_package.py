"""The package as another project depends on it: types, extras, what ships."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sauce_hooks

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

USER = '''\
"""A user's own project, under the strictest type checker."""

from pathlib import Path

import sauce_hooks as sh
from sauce_hooks import Concept, ConceptBank, ConceptEraser, HookPoint, VisionSAE


def forget(model: object, sae: VisionSAE, names: list[str]) -> ConceptEraser:
    place: HookPoint = sae.hook_point
    assert place.d_in > 0 and place.path
    bank: ConceptBank = sae.concepts
    first: Concept = bank[names[0]]
    features: tuple[int, ...] = first.features
    assert features
    return ConceptEraser(model, sae, [*names, first, features], gamma=-0.5, preserve_error=True)


def saved(sae: VisionSAE, folder: Path) -> VisionSAE:
    sae.save(folder)
    return VisionSAE.load(folder)


def together(a: ConceptEraser, b: ConceptEraser) -> object:
    with a | b as both:
        return both


wrong: int = sh.find_hook_point(object()).path
'''


@pytest.mark.slow
def test_a_strict_project_that_uses_the_public_names_has_but_the_error_it_makes(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    settings = f'{{"typeCheckingMode": "strict", "pythonVersion": "3.11", "extraPaths": ["{ROOT / "src"}"]}}'
    (tmp_path / "pyrightconfig.json").write_text(settings)
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--project", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    errors = [line for line in done.stdout.splitlines() if " error: " in line]
    assert len(errors) == 1 and f"user.py:{len(USER.splitlines())}:" in errors[0], done.stdout + done.stderr


@pytest.mark.parametrize(
    "missing,extra,use",
    [
        (
            "peft",
            "baselines",
            "from sauce_hooks.evaluation.attacks.relearning import _adapted as f; f(model, 4, 0).__enter__()",
        ),
        (
            "torchao",
            "attacks",
            "from sauce_hooks.evaluation.attacks.quantisation import quantised as f; f(model, 4).__enter__()",
        ),
    ],
)
def test_what_is_not_installed_is_named_by_its_extra(missing, extra, use):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\nfrom torch import nn; model = nn.Sequential(nn.Linear(64, 64))\n{use}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"pip install 'sauce-hooks[{extra}]'" in done.stderr
    assert extra in PROJECT["project"]["optional-dependencies"]


def test_every_extra_that_a_message_names_exists():
    import re

    named = {
        extra
        for file in (ROOT / "src").rglob("*.py")
        for extra in re.findall(r"sauce-hooks\[([\w-]+)\]", file.read_text(encoding="utf-8"))
    }
    assert named and named <= set(PROJECT["project"]["optional-dependencies"])


def pins(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


@pytest.mark.parametrize("package", ["nnsight", "sae-lens", "transformers"])
def test_the_lowest_version_that_is_promised_is_the_one_that_is_tested(package):
    (required,) = (r for r in PROJECT["project"]["dependencies"] if r.startswith(f"{package}>="))
    lowest = required.removeprefix(f"{package}>=").split(",")[0]
    tested = pins("constraints-lowest.txt")[package]
    assert tested == lowest + ".0" * (tested.count(".") - lowest.count("."))
    assert tuple(map(int, pins("constraints.txt")[package].split("."))) > tuple(map(int, tested.split(".")))


def test_the_version_is_one():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {sauce_hooks.__version__}\n" in citation
    assert PROJECT["project"]["version"] == sauce_hooks.__version__
    assert f"## [{sauce_hooks.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
