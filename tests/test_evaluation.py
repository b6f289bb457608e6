import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.proportion import proportion_confint

from sauce_hooks import (
    Concept,
    ConceptEraser,
    Results,
    evaluate,
    read_activations,
    scenes,
)
from sauce_hooks.errors import UnknownConceptError
from sauce_hooks.evaluation import (
    METRICS,
    ORIGINAL,
    Answer,
    Probe,
    ProbeSet,
    Question,
    Rate,
    Wording,
    ask,
    mentions,
    prepare,
)
from sauce_hooks.evaluation.answers import read_description, read_yes_no
from sauce_hooks.evaluation.metrics import SHOWN, auroc, bootstrap_mean, rate, score
from tiny import D_SAE, build_llava, make_vision_sae, model_inputs, pictures, snapshot

# Reading answers. ----------------------------------------------------------------------------------------------------

ENGLISH = Wording(yes_no="is there {}?".format, describe=lambda: "describe.")
FRENCH = Wording(yes_no="{} ?".format, describe=lambda: "décris.", yes=("oui",), no=("non",))


@pytest.mark.parametrize(
    ("text", "status"),
    [("yes", "yes"), ("Yes, there is a tiger.", "yes"), (' "YES!"', "yes"), ("no", "no"), ("\nNo, there is not", "no"),
     ("nothing", "invalid"), ("yesterday", "invalid"), ("there is, yes", "invalid"), ("", "invalid"), ("?", "invalid"),
     ("oui", "invalid"), ("I'm sorry, I can't say", "refusal"), ("Sorry", "refusal"), ("unable to tell", "refusal")],
)  # fmt: skip
def test_the_first_word_decides_a_yes_no_answer(text, status):
    assert read_yes_no(text, ENGLISH) == status


@pytest.mark.parametrize(("text", "status"), [("Oui.", "yes"), ("non", "no"), ("yes", "invalid")])
def test_answers_are_read_in_the_language_asked(text, status):
    assert read_yes_no(text, FRENCH) == status


@pytest.mark.parametrize(
    ("text", "status"),
    [("a red tiger.", "text"), ("", "invalid"), (" . ", "invalid"), ("I cannot describe it", "refusal")],
)
def test_a_description_is_text_a_refusal_or_nothing(text, status):
    assert read_description(text) == status


@pytest.mark.parametrize(
    ("text", "concept", "named"),
    [("a red tiger.", "tiger", True), ("Two Tigers!", "tiger", True), ("TIGER", "tiger", True), ("foxes", "fox", True),
     ("a tigerish cat", "tiger", False), ("a starfish", "fish", False), ("a bored face", "red", False),
     ("a scar", "car", False), ("", "car", False), ("a polar bear", "polar bear", True), ("any dot", "a.y", False)],
)  # fmt: skip
def test_a_concept_is_named_as_a_whole_word_in_any_case_or_number(text, concept, named):
    assert mentions(text, concept) is named


@pytest.mark.parametrize(
    ("said", "truth", "correct"),
    [("yes", True, True), ("no", False, True), ("yes", False, False), ("no", True, False), ("refusal", False, False),
     ("invalid", True, False)],
)  # fmt: skip
def test_only_the_true_answer_is_correct(said, truth, correct):
    probe = Probe(pictures(1)[0], frozenset({"tiger"} if truth else ()))
    assert Answer(Question(probe, "yes_no", "tiger"), "", said, 0.0).correct is correct


# Rates. --------------------------------------------------------------------------------------------------------------


def test_eight_of_ten_by_hand():
    found = rate([True] * 8 + [False] * 2)
    # Wilson: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n) with z = 1.96
    assert (found.value, found.n) == (0.8, 10)
    assert (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_a_rate_is_statsmodels_wilson(hits):
    found = rate(iter(hits))
    assert (found.low, found.high) == pytest.approx(proportion_confint(sum(hits), len(hits), method="wilson"))
    assert -1e-9 <= found.low <= found.value + 1e-9
    assert found.value - 1e-9 <= found.high <= 1 + 1e-9


def test_a_rate_of_nothing_is_nan():
    for found in (rate([]), auroc([], [1.0]), auroc([1.0], [])):
        assert found.n == 0
        assert all(math.isnan(v) for v in (found.value, found.low, found.high))


margins = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=15)


@given(positive=margins, negative=margins)
def test_auroc_is_the_share_of_pairs_in_order(positive, negative):
    found = auroc(positive, negative)
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert found.value == pytest.approx(sum(pairs) / len(pairs))
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert auroc(negative, positive).value == pytest.approx(1 - found.value)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_the_mean_over_concepts_leaves_out_nan_and_lies_in_its_interval(values):
    mean, low, high = bootstrap_mean([*values, float("nan")])
    assert mean == pytest.approx(sum(values) / len(values))
    assert low - 1e-9 <= mean <= high + 1e-9
    assert (mean, low, high) == bootstrap_mean(values)


# The metrics, by hand. -----------------------------------------------------------------------------------------------

DOMAINS = {"object": ("tiger", "cat"), "color": ("red", "blue")}


def probe(*concepts):
    return Probe(pictures(1)[0], frozenset(concepts))


def described(probe, text):
    return Answer(Question(probe, "describe", None), text, read_description(text), float("nan"))


def asked(probe, concept, text, margin=0.0):
    return Answer(Question(probe, "yes_no", concept), text, read_yes_no(text, ENGLISH), margin)


def test_every_metric_by_hand():
    """The tiger is erased: three images hold it, two are asked for it in vain."""
    red_tiger, blue_tiger, tiger_and_cat = probe("tiger", "red"), probe("tiger", "blue"), probe("tiger", "cat")
    own = [
        described(red_tiger, "a red thing."), asked(red_tiger, "tiger", "no", -1), asked(red_tiger, "red", "yes"),
        described(blue_tiger, "a tiger."), asked(blue_tiger, "tiger", "yes", 2), asked(blue_tiger, "blue", "no"),
        described(tiger_and_cat, "a cat."), asked(tiger_and_cat, "tiger", "sorry", -3),
        asked(tiger_and_cat, "cat", "no"),
        asked(probe("cat"), "tiger", "no", -2), asked(probe("red"), "tiger", "yes", 0),
    ]  # fmt: skip
    others = [
        asked(probe("cat", "red"), "cat", "yes"),
        asked(probe("cat", "red"), "red", "no"),
        asked(probe("blue"), "blue", "yes"),
        asked(probe("cat"), "blue", "no"),
        asked(probe("blue"), "cat", "yes"),
        asked(probe("red"), "cat", "perhaps"),
        # No part of retention: these images hold the tiger, or are asked for it.
        asked(probe("tiger", "red"), "red", "no"),
        asked(probe("tiger", "red"), "blue", "yes"),
        asked(probe("cat"), "tiger", "yes"),
    ]
    found = score("tiger", own, others, ProbeSet(DOMAINS, {}, {}, {}, ENGLISH))
    assert set(found) == set(METRICS)
    more = {"H", "IRA_near", "known", "refusal"} | {m for m in METRICS if m.startswith(("POPE", "MME", "CHAIR"))}
    assert {name: (r.value, r.n) for name, r in found.items() if name not in more} == {
        "UA_d": (pytest.approx(2 / 3), 3),  # no, yes, refused
        "UA_g": (pytest.approx(2 / 3), 3),  # the second still names it
        "IRA": (1.0, 1),  # the cat
        "CRA": (0.5, 2),  # red denied, blue affirmed
        "SRA": (pytest.approx(1 / 3), 3),  # red alone is both affirmed and named
        "SRA_d": (pytest.approx(1 / 3), 3),
        "SRA_g": (pytest.approx(2 / 3), 3),  # red and the cat
        "TNR": (pytest.approx(2 / 5), 5),  # tiger no and yes; blue no, cat yes and perhaps
        "AUROC": (0.5, 5),  # of the six pairs of −1, 2, −3 with −2, 0 three are in order
        "invalid": (pytest.approx(2 / 17), 17),  # the refusal and the perhaps
    }


def test_always_saying_no_forgets_everything_and_the_table_shows_it():
    own = [asked(probe("tiger"), "tiger", "no", -1), asked(probe("cat"), "tiger", "no", -1)]
    found = score("tiger", own, [asked(probe("cat"), "cat", "no"), asked(probe("red"), "red", "no")],
                  ProbeSet(DOMAINS, {}, {}, {}, ENGLISH))  # fmt: skip
    assert (found["UA_d"].value, found["TNR"].value) == (1.0, 1.0)
    assert (found["IRA"].value, found["CRA"].value, found["AUROC"].value) == (0.0, 0.0, 0.5)


# The table. ----------------------------------------------------------------------------------------------------------


def flat(value):
    return {metric: Rate(value, 10, value, value) for metric in METRICS}


@pytest.fixture
def results():
    return Results(
        {
            (ORIGINAL, "tiger"): flat(0.8), ("<b>ours</b>", "tiger"): flat(0.4),
            (ORIGINAL, "red"): flat(0.5), ("<b>ours</b>", "red"): flat(0.5),
        },
        DOMAINS,
    )  # fmt: skip


def test_the_frame_has_one_row_a_method_concept_and_metric(results):
    frame = results.to_frame()
    assert len(frame) == 4 * len(METRICS)
    assert not frame.duplicated(["method", "concept", "metric"]).any()
    row = frame.set_index(["method", "concept", "metric"]).loc[("<b>ours</b>", "tiger", "UA_d")]
    assert (row["value"], row["original"], row["domain"], row["n"]) == (0.4, 0.8, "object", 10)


def test_retention_is_a_share_of_the_original_models(results):
    assert results.mean("<b>ours</b>", "UA_d")[0] == pytest.approx(0.45)
    assert results.mean("<b>ours</b>", "IRA", relative=True)[0] == pytest.approx((0.4 / 0.8 + 0.5 / 0.5) / 2)
    summary = results.summary({"objects": ["tiger"], "colours": ["red"]})
    assert list(summary["concepts"]) == ["objects (1)", "objects (1)", "colours (1)", "colours (1)"]
    assert list(summary["UA_d"].str.split().str[0]) == ["80.0", "40.0", "50.0", "50.0"]
    assert list(summary["SRA"].str.split().str[0]) == ["80.0", "50.0", "50.0", "100.0"]


def test_a_concept_the_original_does_not_know_has_no_share():
    none = Results({(ORIGINAL, "tiger"): flat(0.0), ("ours", "tiger"): flat(0.0)}, DOMAINS)
    assert math.isnan(none.mean("ours", "IRA", relative=True)[0])


def test_html_is_escaped(results):
    page = results.to_html()
    assert "&lt;b&gt;ours&lt;/b&gt;" in page
    assert "<b>ours" not in page
    assert ORIGINAL in page


def test_markdown_has_one_line_a_method_and_as_many_cells_in_each(results):
    lines = results.to_markdown().splitlines()
    assert len(lines) == 2 + 2
    assert {line.count("|") for line in lines} == {len(SHOWN) + 3}


# Asking. -------------------------------------------------------------------------------------------------------------

WORLD = {"object": ("tiger", "cat"), "color": ("red", "blue")}


@pytest.fixture
def talker(processor):
    """A model that mostly says yes or no."""
    model = build_llava(len(processor.tokenizer))
    with torch.no_grad():
        for word in ("yes", "no"):
            model.lm_head.weight[processor.tokenizer.convert_tokens_to_ids(word)] *= 20
    return model


def questions():
    one, other = (Probe(image, frozenset({"tiger"})) for image in pictures(2))
    return [Question(p, "yes_no", c) for p in (one, other) for c in ("tiger", "fish")] + [
        Question(p, "describe", None) for p in (one, other)
    ]


@pytest.mark.parametrize("phrasing", [0, 2])
def test_questions_asked_together_are_answered_as_alone(talker, processor, phrasing):
    wording = scenes.wording(phrasing)
    together = list(ask(talker, prepare(questions(), wording, processor, 4), wording, processor))
    alone = [a for q in questions() for a in ask(talker, prepare([q], wording, processor, 1), wording, processor)]
    assert [(a.text, a.status) for a in together] == [(a.text, a.status) for a in alone]
    torch.testing.assert_close([a.margin for a in together], [a.margin for a in alone], equal_nan=True, rtol=1e-3, atol=1e-3)
    assert {a.status for a in together[:4]} & {"yes", "no"}


@torch.no_grad()
def test_the_margin_is_logit_yes_minus_logit_no(talker, processor):
    wording = scenes.wording()
    (batch,) = prepare(questions()[:1], wording, processor, 1)
    (answer,) = ask(talker, [batch], wording, processor)
    last = talker(**batch.inputs).logits[0, -1]
    yes, no = (processor.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    assert answer.margin == pytest.approx(float(last[yes] - last[no]), rel=1e-4)
    assert answer.text.split()[0] == processor.decode(last.argmax())


# evaluate. -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def probes():
    def some(seed, concept, *more):
        return [Probe(image, frozenset({concept, *more})) for image in pictures(2, seed)]

    other = {"tiger": "red", "cat": "blue", "red": "cat", "blue": "tiger"}
    return ProbeSet(
        domains=WORLD,
        positives={c: some(i, c, other[c]) for i, c in enumerate(other)},
        retained={c: some(10 + i, c) for i, c in enumerate(other)},
        negatives={c: some(20 + i, other[c]) for i, c in enumerate(other)},
        wording=scenes.wording(),
    )


def run(model, probes, processor, methods=None, sae=None, concepts=("tiger", "red")):
    return evaluate(model, sae, probes, concepts, processor=processor, methods=methods, batch_size=8, progress=False)


def values(results, method):
    return {key[1]: {m: str(r) for m, r in rates.items()} for key, rates in results.scores.items() if key[0] == method}


def test_evaluation_end_to_end(talker, probes, processor):
    sae = make_vision_sae(talker)
    sae.concepts.add(Concept("tiger", tuple(range(D_SAE)), gamma=-3.0))
    list(read_activations(talker, [model_inputs()], sae.hook_point))
    run(talker, probes, processor, methods={})  # warm
    state = snapshot(talker)
    found = run(talker, probes, processor, sae=sae)
    assert snapshot(talker) == state
    assert (found.methods, found.concepts) == ([ORIGINAL, "SAUCE"], ["tiger", "red"])
    assert len(found.to_frame()) == 2 * 2 * len(METRICS)
    assert values(found, ORIGINAL)["tiger"] != values(found, "SAUCE")["tiger"]
    for rates in found.scores.values():
        assert (rates["UA_d"].n, rates["UA_g"].n, rates["SRA"].n) == (2, 2, 2)
        assert rates["IRA"].n == 2  # the other concept of the domain, two images
        assert rates["CRA"].n == 4
        assert rates["TNR"].n > 2
    assert {(e.erased, e.method) for e in found.examples} == {(c, m) for c in ("tiger", "red") for m in found.methods}


def test_doing_nothing_scores_as_the_original_model(talker, probes, processor):
    found = run(talker, probes, processor, methods={"nothing": lambda concept: nullcontext()})
    assert values(found, "nothing") == values(found, ORIGINAL)


def test_methods_get_the_concept_to_erase(talker, probes, processor):
    sae, seen = make_vision_sae(talker), []
    methods = {"mine": lambda concept: seen.append(concept) or ConceptEraser(talker, sae, [concept])}
    assert values(run(talker, probes, processor, methods), "mine") == values(
        run(talker, probes, processor, sae=sae), "SAUCE"
    )
    assert seen == ["tiger", "red"]


def test_a_model_in_training_mode_is_evaluated_in_eval_mode_and_left_as_it_was(talker, probes, processor):
    projector = talker.model.multi_modal_projector
    projector.act = torch.nn.Sequential(projector.act, torch.nn.Dropout(0.5))
    expected = values(run(talker.eval(), probes, processor, methods={}), ORIGINAL)
    talker.train()
    talker.model.vision_tower.eval()
    modes = {name: module.training for name, module in talker.named_modules()}
    assert values(run(talker, probes, processor, methods={}), ORIGINAL) == expected
    assert {name: module.training for name, module in talker.named_modules()} == modes


def test_what_cannot_be_evaluated_is_an_error(talker, probes, processor):
    with pytest.raises(UnknownConceptError, match="Did you mean 'tiger'"):
        run(talker, probes, processor, methods={}, concepts=["tigr"])
    with pytest.raises(ValueError, match="methods"):
        run(talker, probes, processor)
