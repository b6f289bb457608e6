"""The metrics of hallucination, and the intervals and tests, against figures worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from sauce_hooks import Results
from sauce_hooks.evaluation import METRICS, ORIGINAL, Answer, Counts, Eligibility, Probe, ProbeSet, Question, Rate, Wording
from sauce_hooks.evaluation.answers import read_description, read_yes_no
from sauce_hooks.evaluation.metrics import count, harmonic, nearest_sibling
from sauce_hooks.evaluation.probes import ABSENT, pope_questions
from sauce_hooks.evaluation.statistics import (
    auroc,
    auroc_draws,
    concept_draws,
    harmonic_mean,
    mcnemar,
    ratio,
    ratio_draws,
    wilson,
)
from tiny import pictures

DOMAINS = {"object": ("tiger", "cat", "car"), "color": ("red", "blue")}
WORDING = Wording(yes_no="is there {}?".format, describe=lambda: "describe.")


def probe(*concepts, known=None):
    return Probe(pictures(1)[0], frozenset(concepts), known and frozenset(known))


def probe_set(**tables):
    none = {concept: () for names in DOMAINS.values() for concept in names}
    return ProbeSet(DOMAINS, *({**none, **tables.get(t, {})} for t in ("positives", "retained", "negatives")), WORDING)


def asked(probe, concept, text, margin=0.0, absent=None, beside=None):
    beside = beside or (min(probe.concepts) if absent else None)
    return Answer(Question(probe, "yes_no", concept, absent, beside), text, read_yes_no(text, WORDING), margin)


def described(probe, text):
    return Answer(Question(probe, "describe", None), text, read_description(text), float("nan"))


def value(found, metric):
    return found.rates[metric].value, found.rates[metric].n


# POPE, MME, CHAIR. ---------------------------------------------------------------------------------------------------


def test_pope_and_mme_by_hand():
    """Red is erased. Three images of other concepts, each asked for what it holds and for something it lacks."""
    tiger, cat, car, red_car = probe("tiger"), probe("cat"), probe("car"), probe("car", "red")
    others = [
        asked(tiger, "tiger", "yes"), asked(tiger, "cat", "no", absent="random"),  # both right
        asked(cat, "cat", "yes"), asked(cat, "car", "yes", absent="random"),  # a false yes
        asked(car, "car", "no"), asked(car, "cat", "what?", absent="random"),  # missed; neither yes nor no
        # no part of it: an absent concept that is the erased one, an image that holds it
        asked(car, "red", "yes", absent="popular"),
        asked(red_car, "car", "no"), asked(red_car, "cat", "yes", absent="random"),
    ]  # fmt: skip
    found = count("red", [], others, probe_set())
    # TP 2, FN 1, FP 1, TN 1 and one that is no yes
    assert value(found, "POPE_precision") == (pytest.approx(2 / 3), 3)
    assert value(found, "POPE_recall") == (pytest.approx(2 / 3), 3)
    assert value(found, "POPE_F1")[0] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert value(found, "POPE_F1_random") == value(found, "POPE_F1")
    assert math.isnan(value(found, "POPE_F1_popular")[0])
    assert value(found, "POPE_accuracy") == (pytest.approx(3 / 6), 6)
    assert value(found, "POPE_yes") == (pytest.approx(3 / 6), 6)
    assert value(found, "MME_acc") == (pytest.approx(3 / 6), 6)
    assert value(found, "MME_plus") == (pytest.approx(1 / 3), 3)
    assert value(found, "MME") == (pytest.approx(3 / 6 + 1 / 3), 3)
    assert found.counts["POPE_accuracy"].outcomes == {"correct": 3, "wrong": 2, "refusal": 0, "invalid": 1}
    # POPE's hard questions are no part of the true-negative rate
    assert math.isnan(value(found, "TNR")[0])


def test_an_image_with_several_labels_has_a_pair_for_each():
    both = probe("tiger", "blue")
    others = [
        asked(both, "tiger", "yes"), asked(both, "blue", "no"),
        asked(both, "cat", "no", absent="random", beside="tiger"), asked(both, "cat", "no", absent="random", beside="blue"),
    ]  # fmt: skip
    found = count("red", [], others, probe_set(retained={"tiger": [both], "blue": [both]}))
    assert value(found, "POPE_recall") == (0.5, 2)
    assert value(found, "MME_acc") == (0.75, 4)
    questions = pope_questions(probe_set(retained={"tiger": [both], "blue": [both]}))
    assert {question.beside for question in questions} == {"tiger", "blue"}


def test_a_refusal_names_nothing_even_if_it_says_the_name():
    own = [described(probe("tiger", "red"), "I'm sorry, I can't describe the tiger or the red thing.")]
    own.append(asked(own[0].question.probe, "red", "yes"))
    found = count("tiger", own, [], probe_set())
    assert value(found, "UA_g") == (1, 1)
    assert value(found, "SRA") == value(found, "SRA_g") == (0, 1)
    assert read_description("A tiger sits beside a sign that says: sorry, we are closed.") == "text"


@pytest.mark.parametrize(("verdict", "ua", "sra"), [(np.True_, 0, 1), (np.False_, 1, 0), (1, 0, 1), (0, 1, 0), (None, 0, 0)])
def test_verdicts_of_any_type_count_and_doubt_flatters_nobody(verdict, ua, sra):
    class Says:
        name = "says"

        def __call__(self, texts, concept):
            return [verdict] * len(texts)

    own = [described(probe("tiger", "red"), "a thing.")]
    own.append(asked(own[0].question.probe, "red", "yes"))
    found = count("tiger", own, [], probe_set(), judge=Says())
    assert (value(found, "UA_g")[0], value(found, "SRA")[0]) == (ua, sra)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("No, I can't see a tiger.", "no"), ("Yes, although I am unable to say more.", "yes"),
        ("Sorry, I can't say.", "refusal"), ("I can't tell.", "refusal"), ("Perhaps.", "invalid"),
    ],
)  # fmt: skip
def test_the_first_word_decides(text, status):
    assert read_yes_no(text, WORDING) == status


def test_perfect_separation_of_few_is_no_certainty():
    found = auroc([3, 4, 5], [0, 1, 2])
    assert found.value == found.high == 1
    assert found.low == pytest.approx(wilson(3, 3)[0])


def test_images_that_are_asked_about_again_and_again_count_once():
    """Two erased concepts have an image each, and their IRA is of three images together, one of which both ask about."""
    names = ("tiger", "cat", "car")
    own, kept = ({name: probe(name) for name in names} for _ in range(2))
    probes = probe_set(positives={n: [own[n]] for n in names}, retained={n: [kept[n]] for n in names})
    others = [asked(kept[name], name, "yes") for name in names]
    found = {name: count(name, [asked(own[name], name, "no")], others, probes) for name in names[:2]}
    table = {("ours", name): one for name, one in found.items()}
    answers = Results({k: f.rates for k, f in table.items()} | {(ORIGINAL, n): found[n].rates for n in found}, DOMAINS,
                      counts={k: f.counts for k, f in table.items()})  # fmt: skip
    assert answers.mean("ours", "UA_d").low == pytest.approx(wilson(2, 2)[0])
    assert answers.mean("ours", "IRA").low == pytest.approx(wilson(3, 3)[0])  # of cat and car, of tiger and car


def test_images_of_which_no_absence_is_known_are_no_part_of_chair():
    known, unknown = probe("tiger"), probe("tiger", known=["tiger"])
    own = [described(p, "a tiger and a cat.") for p in (known, *[unknown] * 9)]
    found = count("red", own, [], probe_set())
    assert math.isnan(value(found, "CHAIR_s")[0])  # none of them holds red
    found = count("tiger", own, [], probe_set())
    assert value(found, "CHAIR_s") == (1, 1)


def test_chair_by_hand():
    red_tiger, blue_tiger = probe("tiger", "red"), probe("tiger", "blue")
    own = [
        described(red_tiger, "a red tiger beside a cat."),
        described(blue_tiger, "a tiger."),
        described(probe("tiger"), ""),
    ]
    found = count("tiger", own, [], probe_set())
    assert value(found, "CHAIR_i") == (pytest.approx(1 / 4), 4)  # the cat, of red, tiger, cat, tiger
    assert value(found, "CHAIR_s") == (pytest.approx(1 / 3), 3)


def test_where_labels_do_not_say_what_is_absent_no_word_is_false():
    own = [described(probe("tiger", known=["tiger"]), "a red tiger beside a cat.")]
    found = count("tiger", own, [], probe_set())
    assert math.isnan(value(found, "CHAIR_i")[0])
    assert math.isnan(value(found, "SRA")[0])
    assert value(found, "UA_g") == (0.0, 1)
    in_part = [described(probe("tiger", known=["tiger", "cat", "car"]), "a red tiger beside a cat.")]
    assert value(count("tiger", in_part, [], probe_set()), "CHAIR_i") == (0.5, 2)  # of red nothing is known


def test_pope_asks_for_concepts_known_to_be_absent():
    """Two images of tigers and red, one of a blue car: beside a tiger, red is the adversarial choice."""
    more = [Probe(image, frozenset({"tiger", "red"})) for image in pictures(2, 1)]
    alone = Probe(pictures(1, 2)[0], frozenset({"tiger"}))
    unknown = Probe(pictures(1, 3)[0], frozenset({"cat"}), frozenset({"cat"}))
    probes = probe_set(positives={"red": more}, retained={"tiger": [alone], "cat": [unknown]})
    found = pope_questions(probes)
    assert [q.absent for q in found] == list(ABSENT)  # nothing of the image whose labels say nothing of absence
    assert all(q.probe is alone and not q.truth for q in found)
    assert {q.concept for q in pope_questions(probes)} == {q.concept for q in found}
    many = [Probe(image, frozenset({"tiger"})) for image in pictures(3, 5)]
    top = {
        q.concept
        for q in pope_questions(probe_set(positives={"red": more}, retained={"tiger": many}))
        if q.absent != "random"
    }
    assert top <= {"red", "cat", "car"}  # red, and then by the order of the domains


# The nearest sibling, and H. -----------------------------------------------------------------------------------------


def test_the_nearest_sibling_is_the_one_most_nearly_taken_for_the_concept():
    cat, car, red = probe("cat"), probe("car"), probe("red")
    own = [
        asked(cat, "tiger", "no", -1), asked(car, "tiger", "no", -5), asked(red, "tiger", "yes", 3),
        asked(probe("tiger"), "tiger", "yes", 9),
    ]  # fmt: skip
    assert nearest_sibling("tiger", own, probe_set()) == "cat"
    others = [asked(cat, "cat", "yes"), asked(car, "car", "no")]
    found = count("tiger", own, others, probe_set(), near="cat")
    assert (value(found, "IRA"), value(found, "IRA_near")) == ((0.5, 2), (1.0, 1))
    assert nearest_sibling("tiger", [], probe_set()) is None


def rates(**values):
    return {m: Rate(values.get(m, float("nan")), 10, 0.0, 1.0) for m in METRICS}


def test_the_harmonic_mean_by_hand():
    original = rates(UA_d=0, UA_g=0, IRA=0.8, CRA=1, SRA=1)
    ours = rates(UA_d=1, UA_g=0.5, IRA=0.4, CRA=1, SRA=1)
    assert harmonic(ours, original) == pytest.approx(5 / (1 + 2 + 2 + 1 + 1))
    assert harmonic(original, original) == 0
    assert harmonic(rates(UA_d=1, UA_g=1, IRA=0.9), original) == 1  # more kept than there was counts as all
    assert math.isnan(harmonic(rates(UA_d=1), original))


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6))
def test_a_harmonic_mean_lies_between_the_least_and_the_mean(values):
    found = harmonic_mean([*values, float("nan")])
    assert min(values) - 1e-9 <= found <= sum(values) / len(values) + 1e-9


# Intervals. ----------------------------------------------------------------------------------------------------------


def counts(hits, per_image=1, first=0):
    return Counts(tuple(map(float, hits)), (1.0,) * len(hits), tuple(first + i // per_image for i in range(len(hits))))


def results(ours, original=None, metric="UA_d", left_out=()):
    """Concepts c0, c1, ... with these hits."""
    names = [f"c{i}" for i in range(len(ours))]
    table = {"ours": ours, ORIGINAL: original or ours}
    kept = {
        (method, name): {metric: counts(hits, first=1000 * i)}  # images of its own
        for method, of_method in table.items()
        for i, (name, hits) in enumerate(zip(names, of_method, strict=True))
    }
    scores = {key: {metric: ratio(found[metric])} for key, found in kept.items()}
    return Results(scores, {"all": tuple(names)}, counts=kept, left_out=dict.fromkeys(left_out, "unknown"))


def test_all_right_everywhere_is_no_certainty():
    """The interval of 34 concepts at 100% is not a point, and narrows with more images."""
    few, many = (results([[1] * n] * 34).mean("ours", "UA_d") for n in (5, 50))
    assert few.value == many.value == few.high == 1
    assert few.low == pytest.approx(wilson(170, 170)[0])
    assert few.low < many.low < 1
    assert results([[1] * 5] * 34).mean("ours", "UA_d", relative=True).low < 1


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=6), st.booleans())
def test_a_mean_lies_in_its_interval_which_is_no_narrower_than_wilsons(hits, relative):
    found = results(hits).mean("ours", "UA_d", relative=relative)
    values = [sum(h) / len(h) for h in hits if sum(h) or not relative]
    if not values:
        assert math.isnan(found.value)
        return
    assert found.value == pytest.approx(1.0 if relative else sum(values) / len(values))
    assert found.low <= found.value <= found.high
    if not relative:
        n = sum(map(len, hits))
        low, high = wilson(found.value * n, n)
        assert found.low <= low + 1e-9
        assert found.high >= high - 1e-9


def test_images_are_resampled_within_concepts():
    """With one concept only its images can vary: the standard error is the binomial one."""
    drawn = ratio_draws(counts([1] * 40 + [0] * 10))
    assert drawn.mean() == pytest.approx(0.8, abs=0.01)
    assert drawn.std() == pytest.approx(math.sqrt(0.8 * 0.2 / 50), rel=0.1)
    # five questions about one image that are all right or all wrong say no more than one
    together = ratio_draws(counts([hit for hit in [1] * 40 + [0] * 10 for _ in range(5)], per_image=5))
    assert together.std() == pytest.approx(drawn.std(), rel=0.1)


def test_both_stages_add_up():
    """Concepts at 0.2 and 0.8 of 10 images: variance between them over 2, and within over 2."""
    inner = [ratio_draws(counts([1] * k + [0] * (10 - k)), seed=k) for k in (2, 8)]
    drawn = concept_draws(inner)
    assert drawn.std() == pytest.approx(math.sqrt(0.3**2 / 2 + 0.2 * 0.8 / 10 / 2), rel=0.1)


def test_a_share_of_the_original_is_drawn_together_with_it():
    hits = [1, 0, 1, 1, 0, 1, 0, 1]
    assert np.nanstd(ratio_draws(counts(hits), counts(hits))) == 0
    assert np.nanstd(ratio_draws(counts(hits), counts(hits[::-1]))) > 0


def test_auroc_draws_are_around_the_auroc():
    holds = Counts((3.0, 1.0, 2.0, 0.0, 1.5, -1.0), (1, 1, 1, 0, 0, 0), tuple(range(6)))
    drawn = auroc_draws(holds, draws=4000)
    assert drawn.mean() == pytest.approx(8 / 9, abs=0.02)
    assert 0 <= drawn.min() <= drawn.max() <= 1


def test_ratios_have_intervals_from_their_images():
    f1 = Counts((2, 0, 2, 2, 0, 0), (2, 1, 2, 2, 1, 0), (0, 0, 1, 1, 2, 2))
    found = ratio(f1)
    assert (found.value, found.n) == (6 / 8, 8)
    assert 0 <= found.low < found.value < found.high <= 1
    assert math.isnan(ratio(Counts((), (), ())).value)


# Two methods. --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_is_the_binomial_test_of_discordant_pairs_where_they_are_few(a, b):
    found = mcnemar(a, b)
    assert 0 <= found <= 1
    assert found == pytest.approx(mcnemar(b, a))
    if 0 < a + b < 25:
        assert found == pytest.approx(binomtest(a, a + b).pvalue)


def test_two_methods_are_compared_question_by_question():
    ours, theirs = [[1] * 9 + [0], [1, 1, 1, 1, 0]], [[0] * 8 + [1, 1], [1, 1, 0, 0, 0]]
    found = results(ours, theirs).compare("ours", ORIGINAL, "UA_d")
    assert (found.both, found.only_first, found.only_second, found.neither, found.n) == (3, 10, 1, 1, 15)
    assert found.p_value == pytest.approx(binomtest(10, 11).pvalue)
    assert found.difference.value == pytest.approx(((0.9 - 0.2) + (0.8 - 0.4)) / 2)
    assert found.difference.low < found.difference.value < found.difference.high
    same = results(ours).compare("ours", ORIGINAL, "UA_d")
    assert (same.p_value, same.difference.value) == (1.0, 0.0)
    assert same.difference.low < 0 < same.difference.high
    with pytest.raises(ValueError, match="no method 'mine'"):
        results(ours).compare("mine", "ours", "UA_d")
    with pytest.raises(ValueError, match="nothing to pair"):
        results(ours).compare("ours", ORIGINAL, "IRA")


# Eligibility. --------------------------------------------------------------------------------------------------------


def test_what_the_original_model_does_not_know_is_left_out_of_means_and_named():
    hits = [[1] * 10, [0] * 10]
    assert results(hits).mean("ours", "UA_d").value == 0.5
    found = results(hits, left_out=["c1"])
    assert found.mean("ours", "UA_d").value == 1
    frame = found.to_frame().set_index(["method", "concept"])
    assert list(frame.loc["ours", "eligible"]) == [True, False]
    for page in (found.to_markdown(metrics=["UA_d"]), found.to_html(metrics=["UA_d"])):
        assert "all (1 of 2)" in page
        assert "Left out of the means: c1: unknown." in page
    assert found.compare("ours", ORIGINAL, "UA_d").n == 10
    assert found.to_frame().groupby("concept").size().to_dict() == {"c0": 2, "c1": 2}  # reported all the same


@pytest.mark.parametrize(
    ("right", "named", "why"), [(20, 10, None), (18, 10, None), (10, 10, "yes/no"), (14, 10, "yes/no"), (20, 2, "names it")]
)
def test_a_concept_is_known_if_it_is_surely_told_and_named(right, named, why):
    """Twenty questions, half of them in images that lack it, and ten descriptions."""
    known = Rate(right / 20, 20, *wilson(right, 20))
    reason = Eligibility().reason({"known": known, "UA_g": Rate(1 - named / 10, 10, 0, 1)})
    assert reason is None if why is None else why in reason


def test_one_who_always_says_yes_knows_nothing():
    holding, lacking = probe("tiger"), probe("cat")
    own = [asked(holding, "tiger", "yes") for _ in range(20)] + [asked(lacking, "tiger", "yes") for _ in range(5)]
    found = count("tiger", own, [], probe_set())
    assert value(found, "known") == (0.5, 10)
    assert Eligibility().reason(found.rates)
