"""The paper's tables and figures by one command: claims, resuming, sharing among processes, and the page."""

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sauce_hooks.bank import Rate
from sauce_hooks.cli import app
from sauce_hooks.errors import ResumeError
from sauce_hooks.evaluation import ORIGINAL, Results
from sauce_hooks.evaluation.attacks import Quantisation
from sauce_hooks.evaluation.store import slug
from sauce_hooks.reproduce import (
    EXPERIMENTS,
    OURS,
    Claim,
    Finding,
    Relative,
    Size,
    bundled_study,
    figure6,
    figure7,
    reproduce,
    table2,
    table4,
)
from sauce_hooks.reproduce.finding import held, new_figure
from sauce_hooks.reproduce.page import write_findings
from sauce_hooks.scenes import load_model

TASKS = {"concrete": ("tiger", "soccer"), "abstract": ("red", "happy")}
KEPT = ("tiger", "cat", "car", "red", "blue", "happy", "sad")
"""What retention is asked of."""
SIZE = Size(n=4, retained=1, merged=(1, 4), attacked=1, attack_n=2, perturbed=1, perturbed_n=1)


def _other_tower():
    model, processor = load_model()
    model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.data.mul_(1.5)
    return model, processor


def make(weights=None):
    """Four concepts, a rival without training, and two relatives: the model itself, and one of another tower."""
    study = bundled_study(weights, SIZE)
    methods = {name: study.methods()[name] for name in (OURS, "random features")}

    def few(n, retained):
        shown = study.probes(n, retained)
        return replace(shown, retained={concept: shown.retained[concept] for concept in KEPT})

    return replace(
        study,
        probes=few,
        tasks=TASKS,
        methods=lambda: methods,
        relatives=(Relative("twin", "transfers", load_model), Relative("stranger", "ruined", _other_tower)),
        attacks=lambda: {"quantisation": Quantisation(bits=(4,), towers=(True,))},
    )


def make_one(weights=None):
    """The same with one concrete concept."""
    study = make(weights)
    return replace(study, tasks={"concrete": ("tiger",), "abstract": ("red",)}, size=replace(SIZE, merged=(1, 2)))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Everything, once."""
    out = tmp_path_factory.mktemp("reproduction")
    return out, {finding.name: finding for finding in reproduce(make_one, out)}


# Groups. ---------------------------------------------------------------------------------------------------------------


@given(per_task=st.integers(1, 12), size=st.integers(1, 24))
def test_every_size_erases_every_concept_once_and_never_twice(per_task, size):
    tasks = {"concrete": tuple(f"c{i}" for i in range(per_task)), "abstract": tuple(f"a{i}" for i in range(per_task))}
    every = [concept for names in tasks.values() for concept in names]
    within = per_task % size == 0
    if not within and 2 * per_task % size:
        with pytest.raises(ValueError, match="do not come out even"):
            figure6.groups(tasks, size)
        return
    found = figure6.groups(tasks, size)
    assert all(len(group) == size for group in found)
    assert sorted(concept for group in found for concept in group) == sorted(every)
    if within:
        assert all(len({concept[0] for concept in group}) == 1 for group in found), "of one task"


# Claims. ---------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=4), st.booleans())
def test_a_claim_holds_if_every_margin_does_and_is_open_if_one_is_unknown(margins, strict):
    assert held(*margins, strict=strict) is (min(margins) > 0 if strict else min(margins) >= 0)
    assert held(*margins, math.nan, strict=strict) is None


def test_outcomes_in_words():
    said = {
        (kind, holds): Claim("", "", "", holds, kind).outcome for kind in ("paper", "goal") for holds in (True, False, None)
    }
    assert list(said.values()) == ["reproduced", "not reproduced", "not measured", "reached", "not reached", "not measured"]


def _results(figures):
    """Results of methods with one value for all metrics but those given."""
    rates = {
        (method, concept): {
            metric: Rate(values.get(metric, 0.9), 50, values.get(metric, 0.9), values.get(metric, 0.9))
            for metric in table2.COLUMNS
        }
        for method, values in {ORIGINAL: dict.fromkeys(table2.SHARES, 1.0), **figures}.items()
        for concept in ("tiger", "red")
    }
    return Results(rates, {"object": ("tiger",), "color": ("red",)})


def test_sauce_is_first_only_if_it_is(monkeypatch):
    monkeypatch.setattr(Results, "compare", lambda self, a, b, metric: _comparison(self, a, b, metric))
    ahead = {OURS: {"UA_d": 0.99, "UA_g": 0.99, "IRA": 0.99}, "GA": {"IRA": 0.2}, "GD": {"IRA": 0.3}, "KL": {}, "PO": {}}
    assert [claim.holds for claim in table2.paper_claims(_results(ahead))] == [True, True, True]
    behind = {**ahead, "PO": {"UA_d": 1.0, "UA_g": 1.0}, "GD": {"IRA": 0.995}}
    assert [claim.holds for claim in table2.paper_claims(_results(behind))] == [False, False, False]
    level = {name: {} for name in ahead}
    assert [claim.holds for claim in table2.paper_claims(_results(level))] == [False, False, False], "level is not first"
    assert [claim.holds for claim in table2.paper_claims(_results({OURS: {}}))] == [None, None]


def _comparison(results, first, second, metric):
    from types import SimpleNamespace

    apart = results.mean(first, metric)[0] - results.mean(second, metric)[0]
    return SimpleNamespace(metric=metric, difference=SimpleNamespace(value=apart, low=apart, high=apart))


# A run. ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_writes_every_table_picture_and_one_page(small):
    out, found = small
    assert list(found) == list(EXPERIMENTS)
    for name, finding in found.items():
        assert len(pd.read_csv(out / f"{name}.csv")) == len(finding.data)
        assert finding.title in (out / f"{name}.md").read_text()
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / f"{name}.svg").read_text()
    page = (out / "index.html").read_text()
    assert all(finding.title in page for finding in found.values())
    assert "http" not in page.replace("http-equiv", "").split("<body>")[0], "the page needs nothing but itself"


@pytest.mark.slow
def test_what_is_measured_on_four_images_is_what_a_user_expects(small):
    _, found = small
    table = found["figure6"].table.set_index(["concepts", "erased"])
    assert float(table.loc[("concrete (1)", "1 at once"), "unlearning score"]) >= 75
    assert float(table.loc[("concrete (1)", "original model"), "unlearning score"]) <= 25
    transfer = {claim.said: claim for claim in found["table4"].claims}
    twin = next(claim for said, claim in transfer.items() if said.startswith("twin"))
    assert twin.holds and twin.measured.endswith("mean 0.0"), "the same model loses nothing"
    refused = next(claim for said, claim in transfer.items() if "refused" in said)
    assert refused.holds and "SAEMismatchError" in refused.measured


@pytest.mark.slow
def test_a_second_run_asks_nothing_again(small, monkeypatch):
    out, first = small

    def never(*_, **__):
        raise AssertionError("asked again")

    for place in ("evaluation.run", "reproduce.figure6", "evaluation.attacks.subject"):
        monkeypatch.setattr(f"sauce_hooks.{place}.ask", never)
    again = {finding.name: finding for finding in reproduce(make_one, out)}
    for name, finding in again.items():
        assert finding.to_markdown() == first[name].to_markdown()


@pytest.mark.slow
def test_a_folder_of_another_study_is_refused_and_damage_is_named(small):
    out, _ = small
    other = replace(make_one(), size=replace(SIZE, merged=(1, 2), attack_n=3))
    with pytest.raises(ResumeError, match="other settings: size"):
        figure7.read(other, out / "figure7")
    study = make_one()
    (part,) = (out / "figure7" / "parts").rglob("*.json")
    whole = part.read_text()
    part.write_text(whole[:40])
    with pytest.raises(ResumeError, match=r"remove it to have it anew"):
        figure7.read(study, out / "figure7")
    part.write_text(whole)


@pytest.mark.slow
def test_processes_do_what_none_is_at_and_only_the_first_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = []
    fill = figure6.fill
    experiment = replace(EXPERIMENTS["figure6"], fill=lambda *given: (asked.append(given[2]), fill(*given)))
    monkeypatch.setattr("sauce_hooks.reproduce.run.EXPERIMENTS", {"figure6": experiment})
    monkeypatch.setenv("RANK", "1")
    units = figure6.units(make_one())
    for unit in units[:2]:  # the other process has been there
        reproduce_done(tmp_path / "done" / "figure6", unit)
    fill(make_one(), tmp_path / "figure6", units[0])
    fill(make_one(), tmp_path / "figure6", units[1])
    assert reproduce(make_one, tmp_path, ["figure6"]) == []
    assert asked == units[2:]
    assert not (tmp_path / "figure6.md").exists()
    monkeypatch.setenv("RANK", "0")
    (found,) = reproduce(make_one, tmp_path, ["figure6"])
    assert asked == units[2:], "nothing is done twice"
    assert (tmp_path / "figure6.md").read_text() == found.to_markdown()


def reproduce_done(folder, unit):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / slug(" ".join(unit))).touch()


def test_an_unknown_experiment_is_named(tmp_path):
    with pytest.raises(ValueError, match="unknown experiment 'table3'; known: table2"):
        reproduce(make, tmp_path, ["table3"])
    result = CliRunner().invoke(app, ["reproduce", "table3"])
    assert result.exit_code == 2 and "table3" in result.output


def test_the_paper_s_figures_are_units_of_the_bundled_study():
    study = bundled_study()
    assert len(study.concepts) == 20 and set(study.tasks) == {"concrete", "abstract"}
    assert len(table2.units(study)) == 20
    assert sum(len(unit) - 1 for unit in figure6.units(study)) == 5 * 20, "the original and four sizes, all concepts each"
    assert len(table4.units(study)) == 3 * 10
    attacked = figure7.units(study)
    assert {attack for attack, _ in attacked} == {"second language", "quantisation", "paraphrases", "adversarial images"}
    assert len(set(attacked)) == len(attacked)


def test_the_page_shows_strange_names_as_text(tmp_path):
    evil = "<script>alert(1)</script>"
    frame = pd.DataFrame([{"method": evil}])
    finding = Finding("table2", evil, evil, frame, frame, lambda: new_figure(1)[0], [Claim(evil, evil, evil, None)], [evil])
    path = write_findings([finding], tmp_path / "index.html", evil)
    assert evil not in Path(path).read_text()
    finding.write(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "index.html",
        "table2.csv",
        "table2.md",
        "table2.png",
        "table2.svg",
    ]
