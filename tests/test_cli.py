"""The command line, as a user meets it: what it prints, where, and with which exit code."""

import runpy
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sauce_hooks import scenes
from sauce_hooks.cli import app
from sauce_hooks.sae import PRESETS

runner = CliRunner()
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    scene = next(s for s in scenes.sample(50, seed=2, contains="tiger"))
    path = tmp_path_factory.mktemp("photos") / "tiger.png"
    scene.image.save(path)
    return path


def test_help_lists_every_verb():
    shown = runner.invoke(app, ["--help"]).output
    for verb in ("demo", "table", "hook-point", "train-sae", "features", "learn", "ask"):
        assert verb in shown


def test_hook_point_says_where():
    result = runner.invoke(app, ["hook-point", "bundled"])
    assert result.exit_code == 0
    assert "model.vision_tower.encoder.layers.3" in result.output


def test_a_place_that_does_not_exist_is_an_error_message_and_no_traceback():
    result = runner.invoke(app, ["hook-point", "bundled", "--layer", "-9"])
    assert result.exit_code == 1
    assert "layer -9 does not exist" in result.output
    assert "Traceback" not in result.output


def test_ask_answers_before_and_after(photo):
    result = runner.invoke(app, ["ask", "bundled", str(photo), "describe this picture.", "--erase", "tiger"])
    assert result.exit_code == 0
    before, after = (line.split(":", 1)[1] for line in result.stdout.splitlines() if line.startswith(("before", "after")))
    assert "tiger" in before
    assert "tiger" not in after


def test_an_unknown_concept_is_answered_with_the_nearest(photo):
    result = runner.invoke(app, ["ask", "bundled", str(photo), "describe this picture.", "--erase", "tigr"])
    assert result.exit_code == 1
    assert "Did you mean 'tiger'" in result.output


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_example_runs(example, capsys):
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out


def test_the_first_program_of_the_readme_runs_as_printed(capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = [block.split("```", 1)[0] for block in readme.split("```python\n")[1:]]
    program = next(block for block in blocks if "scenes.load()" in block)
    assert 'with ConceptEraser(model, sae, ["red", "tiger"]):' in program
    exec(compile(program, "README.md", "exec"), {})
    assert "tiger" not in capsys.readouterr().out


def test_the_help_of_train_sae_names_every_preset():
    help_text = runner.invoke(app, ["train-sae", "--help"], terminal_width=200).output
    assert [name for name in PRESETS if name not in help_text] == []
