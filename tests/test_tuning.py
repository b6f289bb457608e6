"""Tuning: laws of the search on made-up figures, and measuring on the bundled model."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sauce_hooks import Concept, ConceptBank, ConceptEraser, learn_concept, scenes
from sauce_hooks.bank import Rate
from sauce_hooks.concepts import set_statistics, token_moments
from sauce_hooks.concepts.tuning import FORGOTTEN, Measure, Target, Tuning, smallest_edit
from sauce_hooks.concepts.ways import Sets, ways
from sauce_hooks.errors import ContrastError, ImagesError, ModelBelowGateError
from sauce_hooks.evaluation import measure as measure_module
from sauce_hooks.evaluation.measure import chat_prompt, measure_images, measure_probes, tune_concept
from tiny import model_inputs, snapshot

KS, GAMMAS = (1, 2, 4, 8), (0.5, 0.0, -0.25, -0.5, -1.0, -1.5, -2.0)
CONCEPT = Concept("red", tuple(range(8)), (1.0,) * 8, means=(1.0,) * 8, gates=(0.5,) * 8)
ORIGINAL = {"UA_d": 0.0, "UA_g": 0.0, "SRA": 1.0, "IRA": 1.0}

shares = st.integers(0, 20).map(lambda i: i / 20)
subsets = st.lists(st.sampled_from(KS), min_size=1, unique=True), st.lists(st.sampled_from(GAMMAS), min_size=1, unique=True)


def rates(values):
    return {name: Rate(value, 20, value, value) for name, value in values.items()}


def measure_of(function, original=ORIGINAL):
    """A measure that computes its figures, and the list of what it was asked."""
    asked = []

    def of(concept):
        asked.append((len(concept.features), concept.gamma, concept.edit))
        return rates(function(concept))

    return Measure(of, rates(original), "made-up images"), asked


def monotone(seed):
    """Figures that grow, or fall, with the strength |1 − γ| as the law of halving supposes, differently for every k."""
    rng = np.random.default_rng(seed)
    steps = {
        (k, name): np.sort(rng.random(len(GAMMAS)).round(1)) for k in range(1, 9) for name in ("UA_d", "UA_g", "SRA", "IRA")
    }

    def figures(concept):
        at = GAMMAS.index(concept.gamma)
        k = len(concept.features)
        return {
            **{name: float(steps[k, name][at]) for name in ("UA_d", "UA_g")},
            **{name: 1 - float(steps[k, name][at]) for name in ("SRA", "IRA")},
        }

    return figures


def quietly(tuning, concept=CONCEPT):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return smallest_edit(concept, tuning)


def missed(target, figures):
    targets = [target] if isinstance(target, Target) else target
    return [t.missed_by(figures, rates(ORIGINAL)) for t in targets]


TARGETS = [
    (Target("UA_d", at_least=0.5), Target("UA_g", at_least=0.5)),
    (Target("UA_d", at_least=0.5), Target("IRA", at_most_lost=0.5)),
    Target("IRA", at_most_lost=0.3),
    (Target("SRA", at_least=0.6), Target("IRA", at_most_lost=0.5)),
]
EVERY = pytest.mark.parametrize("target", TARGETS, ids=["forgotten", "both", "retained", "kept"])


# The law of the choice. ----------------------------------------------------------------------------------------------


@EVERY
@given(data=st.data(), ks=subsets[0], gammas=subsets[1], whole=st.booleans())
def test_the_target_is_reached_if_anything_measured_reaches_it(target, data, ks, gammas, whole):
    drawn = {}

    def figures(concept):
        key = len(concept.features), concept.gamma
        return drawn.setdefault(key, {name: data.draw(shares) for name in ORIGINAL})

    measure, _ = measure_of(figures)
    concept = quietly(Tuning(measure, target, ks, gammas, whole=whole))
    curve = concept.effect.curve
    reached = [point for point in curve if not any(missed(target, point.figures))]
    (chosen,) = [point for point in curve if point.chosen]
    assert (chosen in reached) == bool(reached) == concept.provenance["reached"]
    if not reached:
        assert max(missed(target, chosen.figures)) == min(max(missed(target, point.figures)) for point in curve)
    assert (len(concept.features), concept.gamma) == (chosen.k, chosen.gamma)
    assert concept.effect.figures == chosen.figures and concept.effect.original == measure.original


@EVERY
@given(seed=st.integers(0, 2**20), ks=subsets[0], gammas=subsets[1], whole=st.booleans())
def test_the_curve_holds_every_measured_setting_once(target, seed, ks, gammas, whole):
    measure, asked = measure_of(monotone(seed))
    curve = quietly(Tuning(measure, target, ks, gammas, ("scale", "clamp"), whole)).effect.curve
    assert [(p.k, p.gamma, p.edit) for p in curve] == asked
    assert len(set(asked)) == len(asked)
    assert sum(p.chosen for p in curve) == 1
    if whole:
        assert set(asked) == {(k, g, e) for k in ks for g in gammas for e in ("scale", "clamp")}


@EVERY
@given(seed=st.integers(0, 2**20), ks=subsets[0], gammas=subsets[1], data=st.data())
def test_the_order_of_what_is_tried_does_not_matter(target, seed, ks, gammas, data):
    measure, _ = measure_of(monotone(seed))
    one = quietly(Tuning(measure, target, ks, gammas))
    shuffled = data.draw(st.permutations(ks)), data.draw(st.permutations(gammas))
    other = quietly(Tuning(measure, target, *shuffled))
    assert one == other and one.effect == other.effect


@EVERY
@given(seed=st.integers(0, 2**20), ks=subsets[0], gammas=subsets[1])
def test_halving_finds_what_measuring_everything_finds(target, seed, ks, gammas):
    measure, asked = measure_of(monotone(seed))
    halved = quietly(Tuning(measure, target, ks, gammas))
    most = len(ks) * (math.floor(math.log2(len(gammas))) + 1)
    assert len(asked) <= most
    everything = quietly(Tuning(measure, target, ks, gammas, whole=True))
    assert halved.provenance["reached"] == everything.provenance["reached"]
    if halved.provenance["reached"]:  # where every figure is monotone, the best of each line lies at the edge that is found
        merit = ("UA_d", "UA_g") if target in TARGETS[2:] else ("SRA", "IRA")
        pick = min if target in TARGETS[2:] else sum
        found = [pick([c.effect.figures[name].value for name in merit]) for c in (halved, everything)]
        assert found[0] == pytest.approx(found[1])


def test_seven_factors_take_three_measurements_a_number_of_features():
    measure, asked = measure_of(monotone(0))
    quietly(Tuning(measure, FORGOTTEN, KS, GAMMAS))
    assert len(asked) == 3 * len(KS)


# What is taken. ------------------------------------------------------------------------------------------------------


def test_of_what_forgets_enough_the_setting_that_keeps_most_is_taken_and_of_equals_the_one_that_writes_least():
    def figures(concept):
        enough = len(concept.features) * (1 - concept.gamma) >= 2  # k=1: γ ≤ −1; k=2: γ ≤ 0
        return {"UA_d": float(enough), "UA_g": float(enough), "SRA": 0.9 if len(concept.features) == 2 else 0.8}

    tuned = quietly(Tuning(measure_of(figures)[0], ks=(1, 2), gammas=GAMMAS))
    assert (tuned.features, tuned.gamma) == ((0, 1), 0.0)
    assert tuned.scores == (1.0, 1.0) and tuned.means == (1.0, 1.0) and tuned.gates == (0.5, 0.5)

    def nothing_said_of_the_rest(concept):
        return {name: value for name, value in figures(concept).items() if name != "SRA"}

    # ‖μ‖ |1 − γ|: 2 for one feature at γ = −1, √2 for two at γ = 0; with a weak second feature still less
    assert quietly(Tuning(measure_of(nothing_said_of_the_rest)[0], ks=(1, 2), gammas=GAMMAS)).gamma == 0.0
    heavy = replace(CONCEPT, means=(1.0, 9.0, *CONCEPT.means[2:]))
    assert quietly(Tuning(measure_of(nothing_said_of_the_rest)[0], ks=(1, 2), gammas=GAMMAS), heavy).gamma == -1.0


def test_a_target_of_retention_alone_forgets_as_much_as_it_allows():
    def figures(concept):
        strength = (1 - concept.gamma) / 3
        return {"UA_d": strength, "UA_g": strength, "IRA": 1 - strength / 10}

    tuned = smallest_edit(CONCEPT, Tuning(measure_of(figures)[0], Target("IRA", at_most_lost=0.05), (1,), GAMMAS))
    assert tuned.gamma == -0.5  # IRA 0.95; at γ = −1 it is 0.933


def test_a_target_that_is_missed_warns_with_how_close_it_came_and_the_effect_says_so():
    def figures(concept):
        return {"UA_d": 0.5 if concept.gamma == -2 else 0.1, "UA_g": 0.9}

    with pytest.warns(
        UserWarning, match=r"'red': nothing that was tried reaches .*UA_d at least 0.96.*has UA_d 0.5.*γ = -2"
    ):
        tuned = smallest_edit(CONCEPT, Tuning(measure_of(figures)[0], ks=(1, 2), gammas=GAMMAS))
    assert tuned.gamma == -2
    assert "made-up images; nothing that was tried reaches the target" in tuned.effect.images
    assert tuned.provenance["reached"] is False


def test_an_edit_without_a_factor_is_tried_once_a_number_of_features_and_edits_are_set():
    measure, asked = measure_of(lambda concept: {"UA_d": 1.0, "UA_g": 1.0, "SRA": float(concept.edit == "replace")})
    tuned = smallest_edit(CONCEPT, Tuning(measure, ks=(1, 2), gammas=GAMMAS, edits=("clamp", "replace")))
    assert tuned.edit == "replace"
    assert [a for a in asked if a[2] == "replace"] == [(1, 0.0, "replace"), (2, 0.0, "replace")]


def test_a_model_that_has_nothing_to_forget_is_an_error():
    measure, asked = measure_of(lambda concept: {"UA_d": 1.0, "UA_g": 1.0}, {"UA_d": 1.0, "UA_g": 0.97})
    with pytest.raises(ModelBelowGateError, match=r"nothing to forget.*UA_d 1, UA_g 0.97"):
        smallest_edit(CONCEPT, Tuning(measure))
    assert not asked


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_figure_that_is_not_measured_is_named(value):
    figures = {"UA_d": 1.0, **({} if value is None else {"IRA": value})}
    measure, _ = measure_of(lambda concept: figures)
    with pytest.raises(ContrastError, match=r"asks for IRA.*measured: UA_d"):
        smallest_edit(CONCEPT, Tuning(measure, (Target("UA_d", at_least=0.5), Target("IRA", at_most_lost=0.02))))


@pytest.mark.parametrize(
    "wrong",
    [lambda: Target("IRA"), lambda: Target("IRA", 0.5, 0.5), lambda: Target("UA_d", at_most_lost=0.1),
     lambda: Tuning(measure_of(dict)[0], ks=()), lambda: Tuning(measure_of(dict)[0], ks=(0, 1)),
     lambda: Tuning(measure_of(dict)[0], gammas=()), lambda: Tuning(measure_of(dict)[0], target=())],
)  # fmt: skip
def test_what_cannot_be_asked_is_an_error(wrong):
    with pytest.raises(ContrastError):
        wrong()


# learn_concept. ------------------------------------------------------------------------------------------------------

BRIGHT = [{"pixel_values": 1.5 + 0.3 * model_inputs(6, seed=i)["pixel_values"]} for i in range(2)]
DARK = [{"pixel_values": -1.5 + 0.3 * model_inputs(6, seed=i)["pixel_values"]} for i in range(2, 4)]


def test_learn_concept_tunes_and_stores_what_it_found(model, sae):
    measure, asked = measure_of(lambda concept: {"UA_d": float(len(concept.features) > 2), "UA_g": 1.0})
    concept = learn_concept(model, sae, "bright", BRIGHT, DARK, tune=Tuning(measure, ks=(1, 3, 5), gammas=(0.0, -1.0)))
    assert (len(concept.features), concept.gamma) == (3, 0.0)
    assert len(concept.effect.curve) == len(asked)
    assert sae.concepts["bright"] is concept
    assert concept.provenance["k"] == 3 and "UA_d at least 0.96" in concept.provenance["target"]
    plain = learn_concept(model, sae, "bright", BRIGHT, DARK, k=3)
    assert (plain.features, plain.means, plain.gates) == (concept.features, concept.means, concept.gates)


@pytest.mark.parametrize("given_too", [{"k": 3}, {"gamma": -1.0}])
def test_what_tuning_finds_cannot_be_given(model, sae, given_too):
    with pytest.raises(ContrastError, match="tuning finds k and gamma"):
        learn_concept(model, sae, "bright", BRIGHT, DARK, tune=Tuning(measure_of(dict)[0]), **given_too)


# Measuring, on the bundled world. ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled():
    return scenes.load()


def few_probes():
    """Of a world of three concepts, so that few questions are asked."""
    every = scenes.probes(3, retained=3, negatives=1, split="val")
    names = ("red", "orange", "tiger")
    few = {field: {name: getattr(every, field)[name] for name in names} for field in ("positives", "retained", "negatives")}
    return replace(every, domains={"color": names[:2], "object": names[2:]}, **few)


def drawn(n, **kind):
    return [scene.image for scene in scenes.sample(n, seed=31, split="val", **kind)]


def test_only_the_questions_that_the_figures_take_are_asked(bundled, monkeypatch):
    model, processor, sae = bundled
    probes = few_probes()
    seen = []
    real = measure_module.ask
    monkeypatch.setattr(
        measure_module, "ask", lambda m, batches, *rest: (seen.extend(q for b in batches for q in b.questions),
                                                          real(m, batches, *rest))[1]
    )  # fmt: skip
    for metrics, expected in (
        (("UA_d",), lambda q: q.concept == "red" and q.truth),
        (("UA_g",), lambda q: q.kind == "describe"),
        (("IRA",), lambda q: q.concept in scenes.DOMAINS["color"] and q.concept != "red" and q.truth),
        (("TNR",), lambda q: not q.truth),
    ):
        seen.clear()
        measure = measure_probes(model, sae, probes, "red", processor=processor, metrics=metrics)
        assert seen and all(expected(q) for q in seen), metrics
        assert tuple(measure.original) == metrics and measure.original[metrics[0]].n > 0
    with pytest.raises(ContrastError, match="invalid"):
        measure_probes(model, sae, probes, "red", processor=processor, metrics=("invalid",))


def test_a_measure_has_the_figures_of_the_evaluation_and_leaves_the_model_as_it_was(bundled):
    from sauce_hooks import evaluate

    model, processor, sae = bundled
    probes = few_probes()
    metrics = ("UA_d", "UA_g", "SRA", "IRA", "CRA")
    measure = measure_probes(model, sae, probes, "red", processor=processor, metrics=metrics)
    state = snapshot(model)
    found = measure.of(sae.concepts["red"])
    assert snapshot(model) == state
    table = evaluate(model, sae, probes, ["red"], processor=processor, progress=False)
    for metric in metrics:
        assert found[metric].n > 0
        assert found[metric] == table.scores["SAUCE", "red"][metric]
        assert measure.original[metric] == table.scores["original model", "red"][metric]


def test_from_folders_of_photos_to_a_tuned_concept_in_one_call(bundled, tmp_path):
    model, processor, sae = bundled
    for name, kind in (
        ("red", {"contains": "red"}), ("other", {"lacks": "red"}), ("orange", {"contains": "orange", "lacks": "red"}),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        for i, picture in enumerate(drawn(8, **kind)):
            picture.save(tmp_path / name / f"{i:02}.png")
    wanted = [Target("UA_d", at_least=0.8), Target("UA_g", at_least=0.8), Target("IRA", at_most_lost=0.5)]
    bank = dict(sae.concepts)
    try:
        with pytest.warns(UserWarning, match="tuned on 8 images"):
            concept = tune_concept(
                model, sae, "red", tmp_path / "red", tmp_path / "other", processor=processor, scorers=["cohens_d"],
                siblings={"orange": tmp_path / "orange"}, wording=scenes.wording(),
                tuning={"ks": (1, 2), "gammas": (0.0, -1.0)}, target=wanted,
            )  # fmt: skip
        assert sae.concepts["red"] is concept
    finally:
        for known in bank.values():
            sae.concepts.add(known)
    assert concept.provenance["positives"] == 8 and concept.provenance["siblings"] == {"orange": 8}
    assert concept.effect.images == "8 images of red, 8 of orange, in 4 parts, each with features chosen from the others"
    assert concept.effect.figures["UA_d"].value == 1 and concept.effect.original["UA_d"].value == 0
    assert {"UA_d", "UA_g", "IRA"} == set(concept.effect.figures)
    assert all(found.n == 8 for found in concept.effect.figures.values())
    image = scenes.sample(1, seed=77, contains="red", split="val")[0].image
    inputs = processor(images=image, text=scenes.yes_no_prompt("red"), return_tensors="pt")
    with ConceptEraser(model, sae, [concept]):
        answer = model.generate(**inputs, do_sample=False, max_new_tokens=2)
    assert "no" in processor.decode(answer[0, inputs["input_ids"].shape[1] :])


def test_no_image_is_measured_with_features_that_it_has_helped_to_choose(bundled, monkeypatch):
    """Each fold's eraser must have the features that the images of the other folds give."""
    model, processor, sae = bundled
    sae = replace(sae, concepts=ConceptBank())
    reds, others = drawn(4, contains="red"), drawn(6, lacks="red")
    erased, asked = [], []
    eraser, ask = measure_module.ConceptEraser, measure_module.ask
    monkeypatch.setattr(measure_module, "ConceptEraser", lambda m, s, c: erased.append(c[0].features) or eraser(m, s, c))

    def asking(model, batches, *rest):
        asked.extend(question.probe.image for batch in batches for question in batch.questions)
        return ask(model, batches, *rest)

    monkeypatch.setattr(measure_module, "ask", asking)
    tuning, options = {"ks": (3,), "gammas": (-1.0,)}, {"processor": processor, "scorers": ["difference"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = tune_concept(model, sae, "red", reds, others, wording=scenes.wording(), tuning=tuning, **options)
    pixels = [image.tobytes() for image in reds]
    order = [pixels.index(image.tobytes()) for image in asked]
    assert list(dict.fromkeys(order)) == [0, 1, 2, 3] and len(erased) == 2 * 4

    def seen(images):
        """Written anywhere, and apart, from these images alone."""
        read, moments = (
            [of(model, sae, some, processor=processor) for some in (images, others)]
            for of in (set_statistics, token_moments)
        )
        sets = Sets(*read, {}, {"red": tuple(moments)})
        return [way.features for way in ways(sae, "red", sets, k=3, scorers=["difference"])]

    assert list(zip(erased[:4], erased[4:], strict=True)) == [tuple(seen(reds[:i] + reds[i + 1 :])) for i in range(4)]
    assert tuned.features in seen(reds)


@pytest.mark.parametrize("images", [drawn(1), BRIGHT], ids=["a single image", "model inputs"])
def test_what_cannot_be_split_or_asked_about_is_an_error(bundled, images):
    model, processor, sae = bundled
    with pytest.raises(ImagesError):
        tune_concept(model, sae, "red", images, images, processor=processor)


def test_a_concept_that_the_model_does_not_see_is_refused(bundled):
    model, processor, sae = bundled
    measure = measure_images(model, sae, "red", drawn(3, lacks="red"), processor=processor, wording=scenes.wording())
    with pytest.raises(ModelBelowGateError, match="nothing to forget"):
        smallest_edit(sae.concepts["red"], Tuning(measure))


def test_questions_are_put_in_the_models_own_format(processor):
    assert chat_prompt(processor, "what?") == f"user: {processor.image_token} what? assistant:"
    assert chat_prompt(processor, f"{processor.image_token} what?") == f"{processor.image_token} what?"

    class Chat:
        image_token, chat_template = "<image>", "a template"

        def apply_chat_template(self, messages, add_generation_prompt):
            ((image, text),) = [message["content"] for message in messages]
            return f"[{image['type']}] {text['text']}" + " A:" * add_generation_prompt

    assert chat_prompt(Chat(), "what?") == "[image] what? A:"
