"""The command line, as a user meets it: what it prints, where, and with which exit code."""

import json
import re
import shlex
import shutil
import sys
from functools import partial

import pytest
import typer
from typer.testing import CliRunner

import sauce_hooks
from documents import check_sauce_hooks
from sauce_hooks import HookPoint, cli, find_hook_point, scenes
from sauce_hooks.cli import app
from sauce_hooks.concepts.tuning import Tuning
from sauce_hooks.evaluation import measure
from sauce_hooks.reproduce import EXPERIMENTS
from sauce_hooks.sae import PRESETS, VisionSAE
from sauce_hooks.sae.progress import progress_bar
from sauce_hooks.scenes import load_model

runner = CliRunner()


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    scene = next(s for s in scenes.sample(50, seed=2, contains="tiger"))
    path = tmp_path_factory.mktemp("photos") / "tiger.png"
    scene.image.save(path)
    return path


# Help and completion. -------------------------------------------------------------------------------------------------


def _verbs(command=None, words=()):
    """Every verb: its words and its parser."""
    command = command or typer.main.get_command(app)
    if not hasattr(command, "commands"):
        return [(words, command)]
    return [found for name, part in command.commands.items() for found in _verbs(part, (*words, name))]


def test_help_is_a_table_of_contents():
    shown = runner.invoke(app, ["--help"], terminal_width=80).output
    contents = ["See it", "demo", "ask", "On your own model", "hook-point", "train-sae", "features", "learn", "concept"]
    contents += ["Measure", "table", "frontier", "reproduce"]
    lines = [line.strip("│╭─╮ ") for line in shown.splitlines()]
    listed = [
        next((i for i, line in enumerate(lines) if line == name or line.startswith(f"{name}  ")), -1) for name in contents
    ]
    assert -1 not in listed and listed == sorted(listed)
    assert {words[0] for words, _ in _verbs()} <= set(contents)
    about = [lines[i] for i, name in zip(listed, contents, strict=True) if lines[i] != name]
    assert all(line.endswith(".") for line in about), "each on one line of a narrow terminal"


@pytest.mark.parametrize("words", [words for words, _ in _verbs()], ids=" ".join)
def test_each_verb_has_an_example_that_can_be_typed(words):
    (verb,) = (verb for known, verb in _verbs() if known == words)
    example = verb.help.split("Example: `")[1].split("`")[0]
    assert example.startswith(f"sauce-hooks {' '.join(words)} ")
    check_sauce_hooks(shlex.split(example)[1:])
    shown = " ".join(runner.invoke(app, [*words, "--help"], terminal_width=200).output.split())
    assert f"Example: {example}" in shown


def test_the_shell_completes_verbs_and_names():
    def completed(line):
        environment = {"_SAUCE_HOOKS_COMPLETE": "complete_bash", "COMP_WORDS": f"sauce-hooks {line}"}
        environment["COMP_CWORD"] = str(len(line.split(" ")))
        return runner.invoke(app, [], env=environment, prog_name="sauce-hooks").output.split()

    assert completed("fr") == ["frontier"]
    assert completed("reproduce ") == [*EXPERIMENTS, "all"]
    assert completed("train-sae bundled photos --preset ") == list(PRESETS)
    assert completed("train-sae bundled photos --log-to w") == ["wandb"]


# Answers. -------------------------------------------------------------------------------------------------------------


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
    before, after = (line.split(":", 1)[1] for line in result.stdout.splitlines() if line.startswith(("before", "erased")))
    assert "tiger" in before
    assert "tiger" not in after


def test_an_unknown_concept_is_answered_with_the_nearest(photo):
    result = runner.invoke(app, ["ask", "bundled", str(photo), "describe this picture.", "--erase", "tigr"])
    assert result.exit_code == 1
    assert "Did you mean 'tiger'" in result.output


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
def test_learn_tunes_against_siblings(photos, monkeypatch):
    monkeypatch.setattr(measure, "Tuning", partial(Tuning, ks=(2, 8), gammas=(0.0, -1.0)))  # all: minutes
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


# What is wrong. -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("tabel", 2, "Did you mean 'table'?"),
        ("table --frob", 2, "--frob"),
        ("ask bundled nowhere.png what?", 2, "'nowhere.png' does not exist"),
        ("hook-point {empty}", 2, "holds no vision-language model"),
        ("hook-point bundled --layer 9", 1, "layer 9 does not exist"),
        ("train-sae bundled {empty} --out {empty}/sae --preset frob", 2, "'frob' is none of sauce, batchtopk"),
        ("features {empty}", 1, "should hold one file of weights"),
        ("concept show bundled tigr", 1, "Did you mean 'tiger'?"),
        ("table --concepts tigr", 1, "Did you mean 'tiger'?"),
        ("frontier --concepts tigr", 1, "Did you mean 'tiger'?"),
        ("reproduce figure8", 2, "'figure8' is none of table2, table4"),
        ("reproduce figure6 --config {empty}/own.toml --out {empty}/out", 1, "own.toml"),
    ],
)
def test_what_is_wrong_is_said_on_stderr_and_by_the_exit_code(command, code, message, tmp_path):
    result = runner.invoke(app, command.format(empty=tmp_path).split(), terminal_width=400)
    said = " ".join(result.stderr.replace("│", " ").split())
    assert (result.exit_code, result.stdout) == (code, ""), said
    assert message in said and "Traceback" not in said
    assert isinstance(result.exception, SystemExit)
    assert list(tmp_path.iterdir()) == []


def test_an_extra_that_is_not_installed_is_named_and_other_failed_imports_are_not_hidden(monkeypatch):
    def run(*given):
        raise ImportError(problem)

    monkeypatch.setattr("sauce_hooks.scenes.frontier.run", run)
    problem = "unlearning takes PEFT: pip install 'sauce-hooks[baselines]'"
    result = runner.invoke(app, ["frontier"])
    assert (result.exit_code, result.stderr.strip()) == (1, problem)
    problem = "no module named peft"
    assert isinstance(runner.invoke(app, ["frontier"]).exception, ImportError)


@pytest.mark.parametrize(
    ("verb", "saved", "said"),
    [
        ("frontier", "", "interrupted; what is finished is kept: the same command goes on from there"),
        ("table", "", "interrupted"),
        ("train-sae", "step 6 is saved", "interrupted; step 6 is saved: the same command with --resume goes on from there"),
        ("train-sae", "", "interrupted; nothing new is saved"),
    ],
)
def test_an_interrupt_says_what_it_leaves(verb, saved, said, monkeypatch, tmp_path):
    def run(*given, **more):
        raise KeyboardInterrupt(*([saved] if saved else []))

    monkeypatch.setattr("sauce_hooks.sae.train_sae", run)
    monkeypatch.setattr("sauce_hooks.scenes.frontier.run", run)
    monkeypatch.setattr("sauce_hooks.scenes.table.run", run)
    more = ["bundled", str(tmp_path), "--out", str(tmp_path)] if verb == "train-sae" else []
    result = runner.invoke(app, [verb, *more])
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.strip().splitlines()[-1] == said


# For programs. --------------------------------------------------------------------------------------------------------


def test_programs_read_json():
    result = runner.invoke(app, ["hook-point", "bundled", "--json"])
    assert HookPoint.from_dict(json.loads(result.stdout)) == find_hook_point(load_model()[0])


def test_the_version_and_completion_are_there():
    assert runner.invoke(app, ["--version"]).output.strip() == sauce_hooks.__version__
    assert "--show-completion" in runner.invoke(app, ["--help"], terminal_width=120).output


def _noisy(result):
    def run(*given):
        print("as people read it")
        return result

    return run


def test_with_json_stdout_is_one_document_whatever_else_is_printed(photo, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_BUNDLED_IMAGES", 8)
    monkeypatch.setattr("sauce_hooks.scenes.frontier.run", _noisy([{"concept": "red", "gamma": float("nan")}]))
    page = str(tmp_path / "page.html")
    commands = {
        "features bundled --out": [page],
        "concept show": [str(photos / "sae"), "tiger", "--out", page],
        "ask bundled": [str(photo), "describe this picture.", "--erase", "tiger"],
        "frontier --out": [str(tmp_path)],
    }
    read = {}
    for words, more in commands.items():
        result = runner.invoke(app, [*words.split(), *more, "--json"])
        assert result.exit_code == 0, result.output
        read[words] = json.loads(result.stdout)
    assert read["features bundled --out"]["page"] == read["concept show"]["page"] == page
    assert 0 < read["features bundled --out"]["explained_variance"] <= 1
    assert read["concept show"]["features"] == list(VisionSAE.load(photos / "sae").concepts["tiger"].features)
    assert "tiger" in read["ask bundled"]["before"] and "tiger" not in read["ask bundled"]["erased"]
    assert read["frontier --out"]["cells"] == [{"concept": "red", "gamma": None}], "JSON has no NaN"
    assert "as people read it" in result.stderr


# Progress. ------------------------------------------------------------------------------------------------------------


def test_in_a_log_progress_is_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr("sauce_hooks.sae.progress._SECONDS_IN_A_LOG", 0.0)
    with progress_bar(4, "measure", "concept", show=True, done=1) as bar:
        for _ in range(3):
            bar.set_postfix(loss="0.1")
            bar.update()
    written = capsys.readouterr().err
    assert "\r" not in written and "\x1b" not in written
    lines = written.splitlines()
    assert re.match(r"measure:  25%, 1 of 4 \[", lines[0]) and re.match(r"measure: 100%, 4 of 4 \[.*loss=0.1\]", lines[-1])
    assert all(lines)


def test_in_a_log_ten_thousand_steps_are_two_lines(capsys):
    with progress_bar(10_000, "train", "step", show=True) as bar:
        for _ in range(10_000):
            bar.update()
    assert len(capsys.readouterr().err.splitlines()) == 2, "how it began and how it ended"


def test_on_a_terminal_progress_is_drawn_over_itself(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress_bar(2, "measure", "concept", show=True) as bar:
        bar.update(2)
    assert "\rmeasure: 100%" in capsys.readouterr().err
