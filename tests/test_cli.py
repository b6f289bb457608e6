"""The command line, as a user meets it: what it prints, where, and with which exit code."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sauce_hooks
from sauce_hooks import HookPoint, find_hook_point, scenes
from sauce_hooks.cli import app
from sauce_hooks.sae import PRESETS, VisionSAE
from sauce_hooks.scenes import load_model

runner = CliRunner()


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


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Folders of scenes, and the bundled SAE in a folder of the user's own."""
    home = tmp_path_factory.mktemp("home")
    kinds = {"tiger": {"contains": "tiger"}, "cat": {"contains": "cat", "lacks": "tiger"}, "other": {"lacks": "tiger"}}
    for seed, (name, kind) in enumerate(kinds.items()):
        (home / name).mkdir()
        for i, scene in enumerate(scenes.sample(12, seed=seed, split="train", **kind)):
            scene.image.save(home / name / f"{i}.png")
    shutil.copytree(scenes.asset("sae"), home / "sae")
    return home


def learn(photos, *more):
    folders = [str(photos / name) for name in ("sae", "tiger", "other")]
    return runner.invoke(app, ["learn", "bundled", folders[0], "my tiger", *folders[1:], *more])


def test_learn_remembers_a_concept_in_the_saes_folder(photos):
    result = learn(photos, "--k", "3", "--gamma", "-1")
    assert result.exit_code == 0, result.output
    found = VisionSAE.load(photos / "sae").concepts["my tiger"]
    assert len(found.features) == 3 and found.gamma == -1
    assert f"my tiger: 3 features, best {found.features[0]} " in result.output


@pytest.mark.slow
def test_learn_tunes_against_siblings(photos):
    folders = [str(photos / name) for name in ("sae", "tiger", "other")]
    tuned = ["learn", "bundled", folders[0], "tiger", *folders[1:], "--tune", "--sibling", f"cat={photos / 'cat'}"]
    result = runner.invoke(app, tuned)
    assert result.exit_code == 0, result.output
    found = VisionSAE.load(photos / "sae").concepts["tiger"]
    assert found.effect is not None and found.effect.figures["UA_d"].value >= 0.9
    assert "12 images of tiger, 12 of cat" in result.output and "UA_d" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tune", "--k", "3"], "leave out --k"),
        (["--sibling", "cat"], "NAME=IMAGES"),
        (["--sibling", "cat=nowhere"], "NAME=IMAGES"),
    ],
)
def test_learn_says_what_is_wrong_before_it_loads_anything(photos, options, message):
    result = learn(photos, *options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_programs_read_json():
    result = runner.invoke(app, ["hook-point", "bundled", "--json"])
    assert HookPoint.from_dict(json.loads(result.stdout)) == find_hook_point(load_model()[0])


def test_the_version_and_completion_are_there():
    assert runner.invoke(app, ["--version"]).output.strip() == sauce_hooks.__version__
    assert "--show-completion" in runner.invoke(app, ["--help"], terminal_width=120).output
