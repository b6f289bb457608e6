"""What concepts share; groups and differences of concepts."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sauce_hooks import Concept, ConceptBank, ConceptEraser
from sauce_hooks.bank import Effect, Projection, expanded
from sauce_hooks.concepts.difference import difference
from sauce_hooks.concepts.overlap import overlap
from sauce_hooks.errors import EditError, SAEFileError, UnknownConceptError
from tiny import logits, make_vision_sae, model_inputs


@st.composite
def concept_lists(draw):
    made = []
    for i in range(draw(st.integers(0, 6))):
        features = tuple(draw(st.lists(st.integers(0, 15), unique=True, max_size=6)))
        scored = draw(st.booleans())
        scores = tuple(draw(st.lists(st.floats(-2, 2), min_size=len(features), max_size=len(features)))) if scored else ()
        made.append(Concept(f"c{i}", features, scores))
    return made


@given(concepts=concept_lists())
def test_the_pairs_are_all_that_share_a_feature(concepts):
    found = overlap(concepts)
    expected = {
        (a.name, b.name): set(a.features) & set(b.features)
        for a, b in itertools.combinations(concepts, 2)
        if set(a.features) & set(b.features)
    }
    assert {(pair.a, pair.b): set(pair.features) for pair in found.pairs} == expected
    by_name = {concept.name: concept for concept in concepts}
    for pair in found.pairs:
        both = set(by_name[pair.a].features) | set(by_name[pair.b].features)
        assert pair.jaccard == pytest.approx(len(pair.features) / len(both))
        for name, mass in ((pair.a, pair.mass_a), (pair.b, pair.mass_b)):
            concept = by_name[name]
            sizes = [abs(s) for s in concept.scores]
            sizes = sizes if sum(sizes) > 0 else [1.0] * len(concept.features)
            shared = sum(s for f, s in zip(concept.features, sizes, strict=True) if f in pair.features)
            assert mass == pytest.approx(shared / sum(sizes))
    holders = {f: tuple(c.name for c in concepts if f in c.features) for f in range(16)}
    assert dict(found.features) == {f: names for f, names in holders.items() if len(names) > 1}
    strongest = [max(pair.mass_a, pair.mass_b) for pair in found.pairs]
    assert strongest == sorted(strongest, reverse=True)
    assert found.to_frame().shape == (len(expected), 8)


def test_by_hand(model):
    red, orange, blue = Concept("red", (1, 2), (3.0, 1.0)), Concept("orange", (2, 5), (1.0, 1.0)), Concept("blue", (7,))
    sae = make_vision_sae(model)
    found = overlap(ConceptBank([red, orange, blue]), sae)
    (pair,) = found.pairs
    assert (pair.a, pair.b, pair.features) == ("red", "orange", (2,))
    assert (pair.jaccard, pair.mass_a, pair.mass_b) == (1 / 3, 0.25, 0.5)
    W = sae.sae.W_dec.detach()
    written = 3 * W[1] + W[2], W[2] + W[5]
    assert pair.cosine == pytest.approx(float(torch.cosine_similarity(*written, dim=0)), abs=1e-6)
    assert found.features == {2: ("red", "orange")}
    assert str(found).splitlines()[0] == "1 pairs of 3 concepts share 1 features"
    assert "red" in str(found) and "25%" in str(found) and "blue" not in str(found)


def test_the_same_features_write_the_same(model):
    one = Concept("a", (1, 2), (0.5, 0.25))
    (pair,) = overlap([one, Concept("b", (2, 1), (1.0, 2.0)), Concept("empty", ())], make_vision_sae(model)).pairs
    assert (pair.jaccard, pair.mass_a, pair.mass_b) == (1, 1, 1)
    assert pair.cosine == pytest.approx(1)


def test_of_many_pairs_a_few_are_printed_and_long_names_take_one_line():
    found = overlap(Concept(f"concept\n{i}" + "x" * 100, (0, i + 1)) for i in range(20))
    lines = str(found).splitlines()
    assert len(found.pairs) == 190 and len(lines) == 23
    assert lines[-1] == "… and 170 more pairs"
    assert max(map(len, lines)) < 125


def test_nothing_shared_prints_one_line():
    assert str(overlap([])) == "0 pairs of 0 concepts share 0 features"


# Groups. -------------------------------------------------------------------------------------------------------------

GROUPS = {"colours": ("red", "blue"), "all": ("colours", "tiger", "red")}


def test_a_group_is_its_members_each_once():
    assert expanded(["colours"], GROUPS) == ("red", "blue")
    assert expanded(["tiger", "all", "red"], GROUPS) == ("tiger", "red", "blue")
    plain = Concept("red", (1,))
    assert expanded([plain, (1, 2), "colours"], GROUPS) == (plain, (1, 2), "red", "blue")


@given(items=st.lists(st.sampled_from(["colours", "all", "red", "blue", "tiger"]), max_size=6))
def test_expanding_twice_is_expanding_once(items):
    once = expanded(items, GROUPS)
    assert expanded(once, GROUPS) == once
    assert len(set(once)) == len(once)
    assert set(once) == set().union(*(expanded([item], GROUPS) for item in items))


def test_a_group_within_itself_is_an_error():
    with pytest.raises(EditError, match="a → b → a"):
        expanded(["a"], {"a": ["b"], "b": ["a"]})
    with pytest.raises(EditError, match="member of itself"):
        expanded(["a"], {"a": ["a"]})


@pytest.mark.parametrize("order", itertools.permutations(["colours", "tiger", "red"]))
def test_erasing_a_group_is_erasing_its_members(model, sae, order):
    sae.concepts.group("colours", ["red", "blue"])
    with ConceptEraser(model, sae, order):
        of_group = logits(model)
    with ConceptEraser(model, sae, ["red", "blue", "tiger"]):
        of_members = logits(model)
    with ConceptEraser(model, sae, "blue"), ConceptEraser(model, sae, "tiger"), ConceptEraser(model, sae, "red"):
        nested = logits(model)
    assert torch.equal(of_group, of_members) and torch.equal(nested, of_members)
    assert not torch.equal(of_group, logits(model))


# Differences. --------------------------------------------------------------------------------------------------------

features = st.lists(st.integers(0, 9), unique=True, max_size=8).map(tuple)


@given(mine=features, others=st.lists(features, max_size=3))
def test_a_difference_keeps_what_no_other_has_and_its_settings(mine, others):
    numbers = tuple(float(f) for f in mine)
    concept = Concept("red", mine, numbers, -2.0, "clamp", numbers, numbers, effect=Effect("few", {}))
    rest = [Concept(f"other {i}", names) for i, names in enumerate(others)]
    taken = {f for names in others for f in names}
    expected = tuple(f for f in mine if f not in taken)
    if not expected:
        with pytest.raises(EditError, match="'red'"):
            difference(concept, *rest)
        return
    found = difference(concept, *rest, name="pure red")
    numbers = tuple(float(f) for f in expected)
    assert found == Concept("pure red", expected, numbers, -2.0, "clamp", numbers, numbers)
    assert found.effect is None
    assert all("pure red" not in (pair.a, pair.b) for pair in overlap([found, *rest]).pairs)


def test_a_difference_is_named_and_says_where_it_is_from():
    found = difference(Concept("red", (1, 2), provenance={"k": 2}), Concept("orange", (2,)), Concept("pink", (3,)))
    assert found == Concept("red − orange − pink", (1,))
    assert found.provenance == {"k": 2, "difference": ["red", "orange", "pink"]}


def test_of_a_projection_nothing_can_be_left_out():
    rows = torch.eye(4)[:1]
    projection = Projection(rows, rows, torch.zeros(4))
    with pytest.raises(EditError, match="projection"):
        difference(Concept("red", (), edit="project", projection=projection), Concept("orange", (2,)))
    kept = difference(Concept("red", (1, 2), projection=projection), Concept("orange", (2,)))
    assert kept.features == (1,) and kept.projection is None


def test_erasing_a_difference_leaves_what_only_the_other_has(model, sae):
    inputs = model_inputs(seed=3)
    red = difference(sae.concepts["red"], sae.concepts["tiger"])
    assert red.features == (1, 2)
    with ConceptEraser(model, sae, [red]):
        erased = logits(model, inputs)
    with ConceptEraser(model, sae, [(1, 2)]):
        assert torch.equal(erased, logits(model, inputs))


def test_a_bank_with_groups_goes_round_and_knows_what_cannot_be(tmp_path):
    bank = ConceptBank([Concept("red", (1,)), Concept("blue", (2,))])
    bank.group("colours", ["red", "blue", "red"])
    bank.group("all", ["colours"])
    bank.save(tmp_path)
    assert ConceptBank.load(tmp_path) == bank
    assert ConceptBank.load(tmp_path).groups == {"colours": ("red", "blue"), "all": ("colours",)}
    assert str(bank.diff(ConceptBank(bank.values()))) == "~ group 'colours'\n~ group 'all'"
    assert (ConceptBank(bank.values()) | bank).groups == bank.groups
    with pytest.raises(EditError, match="is a concept"):
        bank.group("red", ["blue"])
    with pytest.raises(UnknownConceptError, match="green"):
        bank.group("colours", ["green"])
    with pytest.raises(EditError, match="member of itself"):
        bank.group("colours", ["all"])
    del bank["red"]
    assert bank.groups["colours"] == ("blue",)
    file = tmp_path / "concepts.json"
    bank.group("colours", ["blue"])
    bank.save(tmp_path)
    file.write_text(file.read_text().replace('"colours": ["blue"]', '"colours": ["pink"]'))
    with pytest.raises(SAEFileError, match="pink"):
        ConceptBank.load(tmp_path)
