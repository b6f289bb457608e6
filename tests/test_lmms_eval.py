"""The model for lmms-eval: its arguments and prompts, and lmms-eval itself end to end on a task of the bundled world."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sauce_hooks import ConceptEraser, scenes
from sauce_hooks.errors import LmmsEvalError
from sauce_hooks.lmms import asking
from sauce_hooks.lmms.settings import Settings

# Arguments -----------------------------------------------------------------------------------------------------------


def read(**given: Any) -> Settings:
    return Settings.read({"pretrained": "bundled", **given})


def test_arguments_come_as_lmms_eval_has_parsed_them():
    settings = read(pretrained=2024, sae="bundled", erase="red+wall clock", gamma=-1, preserve_error=False, batch_size="4")
    assert settings.pretrained == "2024"  # a folder's name that looks like a number
    assert settings.erase == ("red", "wall clock")
    assert settings.eraser["gamma"] == -1.0 and settings.eraser["preserve_error"] is False
    assert settings.batch_size == 4


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"eraze": "red"}, "Did you mean 'erase'"),
        ({"pretrained": ""}, "text is expected"),
        ({"erase": "red"}, "needs an SAE"),
        ({"sae": "bundled", "gamma": -0.5}, "gamma would have no effect"),
        ({"sae": "bundled", "preserve_error": False}, "preserve_error would have no effect"),
        ({"sae": "bundled", "erase": ""}, "empty name"),
        ({"sae": "bundled", "erase": "red++tiger"}, "empty name"),
        ({"sae": "bundled", "erase": "red", "gamma": "low"}, "a number is expected"),
        ({"sae": "bundled", "erase": "red", "preserve_error": 1}, "True or False"),
        ({"batch_size": "auto"}, "whole number"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_arguments_that_cannot_be_are_refused(given, says):
    with pytest.raises(LmmsEvalError, match=says):
        read(**given)


def test_a_model_must_be_named():
    with pytest.raises(LmmsEvalError, match="which model"):
        Settings.read({})


def test_without_lmms_eval_the_model_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.delitem(sys.modules, "lmms_eval.api.model", raising=False)
    monkeypatch.delitem(sys.modules, "sauce_hooks.lmms.model", raising=False)
    with pytest.raises(LmmsEvalError, match=r"sauce-hooks\[lmms-eval\]"):
        importlib.import_module("sauce_hooks.lmms.model")


# Prompts and settings ------------------------------------------------------------------------------------------------


def templated(messages: Any, *, add_generation_prompt: bool) -> str:
    assert add_generation_prompt
    (message,) = messages
    return "".join("<image>" if part["type"] == "image" else part["text"] for part in message["content"]) + " ANSWER:"


CHAT = SimpleNamespace(image_token="<image>", chat_template="...", apply_chat_template=templated)
PLAIN = SimpleNamespace(image_token="<image>", chat_template=None)


@pytest.mark.parametrize(
    ("processor", "question", "n_images", "prompt"),
    [
        (CHAT, "what?", 1, "<image>what? ANSWER:"),
        (CHAT, "what?", 2, "<image><image>what? ANSWER:"),
        (CHAT, "what?", 0, "what? ANSWER:"),
        (CHAT, "is <image> like <image>?", 2, "is <image> like <image>? ANSWER:"),
        (CHAT, "what is <image>?", 1, "what is <image>? ANSWER:"),
        (PLAIN, "what?", 1, "user: <image> what? assistant:"),
        (PLAIN, "what?", 2, "user: <image> <image> what? assistant:"),
        (PLAIN, "what?", 0, "user: what? assistant:"),
        (PLAIN, "user: <image> what? assistant:", 1, "user: <image> what? assistant:"),
    ],
)
def test_a_prompt_has_as_many_places_as_images(processor, question, n_images, prompt):
    assert asking.prompt(processor, question, n_images) == prompt


def test_places_for_other_images_than_there_are_are_refused():
    with pytest.raises(LmmsEvalError, match="2 <image> and 1 images"):
        asking.prompt(CHAT, "is <image> like <image>?", 1)
    with pytest.raises(LmmsEvalError, match="video"):
        asking.asked(CHAT, "what?", ["clip.mp4"])


def test_the_bundled_models_prompt_is_the_one_it_was_trained_on():
    _, processor = scenes.load_model()
    question = "does this image contain tiger? please answer with yes or no."
    assert asking.prompt(processor, question, 1) == scenes.yes_no_prompt("tiger")


@pytest.mark.parametrize(
    ("given", "sampled"),
    [
        ({}, False),
        ({"temperature": 0, "do_sample": True, "top_p": 0.9}, False),
        ({"temperature": 0.7}, True),
        ({"temperature": 0.7, "do_sample": False}, False),
        ({"do_sample": True}, True),
        ({"temperature": 0, "top_p": None, "num_beams": 1, "do_sample": False, "image_aspect_ratio": "pad"}, False),
    ],
)
def test_generation_is_greedy_unless_a_temperature_is_asked_for(given, sampled):
    settings = asking.generation(given, 7)
    assert settings["do_sample"] is sampled
    assert settings["max_new_tokens"] == 7
    assert "image_aspect_ratio" not in settings
    assert sampled or not {"temperature", "top_p", "top_k"} & set(settings)


@given(st.text("ab.\n", max_size=12), st.lists(st.text("ab.\n", max_size=2), max_size=3))
def test_an_answer_ends_at_the_first_stop(text, until):
    said = asking.cut(text, until)
    assert text.startswith(said)
    assert not any(stop in said for stop in until if stop)
    assert said == text or any(text[len(said) :].startswith(stop) for stop in until if stop)


# The bundled model ---------------------------------------------------------------------------------------------------


def test_losses_and_answers_agree_with_each_other_and_with_the_eraser():
    model, processor, sae = scenes.load()
    images = [scene.image for scene in scenes.sample(2, seed=4, contains="tiger")]
    question = "does this image contain tiger? please answer with yes or no."
    batch = [asking.asked(processor, question, [image]) for image in images]
    settings = asking.generation({}, 4)

    def losses(answer: str) -> list[tuple[float, bool]]:
        return [asking.loss(model, processor, one, answer) for one in batch]

    assert asking.answers(model, processor, batch, settings) == ["yes", "yes"]  # to the letter: POPE's parser wants that
    assert all(yes < no for (yes, _), (no, _) in zip(losses("yes"), losses("no"), strict=True))
    assert [greedy for _, greedy in losses("yes")] == [True, True]
    with ConceptEraser(model, sae, ["tiger"]):
        assert asking.answers(model, processor, batch, settings) == ["no", "no"]
        assert [greedy for _, greedy in losses("no")] == [True, True]


# lmms-eval itself ----------------------------------------------------------------------------------------------------

UTILS = """
from lmms_eval.tasks.mme.utils import parse_pred_ans
from lmms_eval.tasks.pope.utils import *

def images(doc):
    return [doc["image"].convert("RGB")]

def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def scored(doc, results):
    assert parse_pred_ans(results[0]) == results[0]  # MME's parser reads the same
    return pope_process_results(doc, results)
"""

TASK = """
task: {name}
dataset_path: {dataset}
dataset_kwargs:
  load_from_disk: true
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: !function utils.question
doc_to_target: "answer"
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
  do_sample: false
process_results: !function utils.scored
metric_list:
  - metric: pope_accuracy
    aggregation: !function utils.pope_aggregate_accuracy
    higher_is_better: true
  - metric: pope_yes_ratio
    aggregation: !function utils.pope_aggregate_yes_ratio
    higher_is_better: true
metadata:
  - version: 0.0
"""


# What the command line does, but for its list of tasks: it reads the 1,900 files of all benchmarks again for every run.
DRIVER = """
import json, sys
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

folder, cache, out, runs = sys.argv[1:]
manager, found = TaskManager(include_path=folder, include_defaults=False), {}
for name, arguments in json.loads(runs).items():
    try:
        found[name] = simple_evaluate(
            model="sauce", model_args=arguments, tasks=["world_tiger", "world_others"], task_manager=manager,
            batch_size="8", device="cpu", use_cache=cache, log_samples=True,
        )
    except Exception as error:
        found[name] = {"error": str(error)}
with open(out, "w") as file:
    json.dump(found, file, default=str)
"""


def write_task(folder: Path, name: str, asked: list[tuple[Any, str]]) -> None:
    """A task of lmms-eval as a folder on disk: images, questions, and POPE's own scoring."""
    from datasets import Dataset, DatasetDict

    rows = [
        {
            "question_id": str(i),
            "image": scene.image,
            "question": f"does this image contain {concept}? please answer with yes or no.",
            "answer": "yes" if concept in scene.concepts else "no",
        }
        for i, (scene, concept) in enumerate(asked)
    ]
    dataset = folder / f"{name}_data"
    DatasetDict({"test": Dataset.from_list(rows)}).save_to_disk(str(dataset))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, dataset=dataset))
    (folder / "utils.py").write_text(UTILS)


@pytest.mark.slow
def test_lmms_eval_runs_with_the_eraser_on_and_off(tmp_path):
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: make test installs it")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    with_tiger, without = (scenes.sample(8, seed=3, **kind) for kind in ({"contains": "tiger"}, {"lacks": "tiger"}))
    write_task(tasks, "world_tiger", [(scene, "tiger") for scene in (*with_tiger, *without)])
    others = [(scene, c) for scene in with_tiger for c in sorted(scene.concepts - {"tiger"})[:1]]
    write_task(tasks, "world_others", [*others, *((scene, "soccer") for scene in with_tiger)])

    runs = {
        "plain": "pretrained=bundled",
        "erased": "pretrained=bundled,sae=bundled,erase=tiger",
        "null": "pretrained=bundled,sae=bundled,erase=tiger,gamma=1,edit=scale",  # the null edit
        "unknown": "pretrained=bundled,sae=bundled,erase=unicorn",
    }
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    found = tmp_path / "found.json"
    run = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tasks), str(tmp_path / "cache"), str(found), json.dumps(runs)],
        capture_output=True,
        text=True,
        env={**os.environ, **offline},
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    told = json.loads(found.read_text())

    def accuracy(name: str) -> dict[str, float]:
        return {task: figures["pope_accuracy,none"] for task, figures in told[name]["results"].items()}

    def answered(name: str) -> list[str]:
        samples = told[name]["samples"]
        return [sample["filtered_resps"][0] for task in sorted(samples) for sample in samples[task]]

    plain, erased = accuracy("plain"), accuracy("erased")
    assert min(plain.values()) >= 0.9
    assert erased["world_tiger"] <= 0.6  # every tiger is denied, and half of the questions are about none
    assert erased["world_others"] >= 0.9
    assert set(answered("plain") + answered("erased")) == {"yes", "no"}
    assert answered("null") == answered("plain") != answered("erased")  # the cache keeps them apart
    assert "unknown concept 'unicorn'" in told["unknown"]["error"]
