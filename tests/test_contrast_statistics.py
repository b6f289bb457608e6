"""Sums over contrast sets: many concepts in one pass, parts that add up, files, and concepts learnt from them."""

import itertools
import json
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from sauce_hooks import learn_concept
from sauce_hooks.concepts import SetStatistics, accumulate_labelled, labelled_statistics, set_statistics
from sauce_hooks.concepts import statistics as statistics_module
from sauce_hooks.concepts.many import learn_concepts
from sauce_hooks.concepts.statistics import LabelledStatistics
from sauce_hooks.concepts.statistics_file import Source
from sauce_hooks.errors import ContrastError, SAEFileError, SAEMismatchError, UnknownConceptError
from tiny import make_vision_sae, model_inputs

NAMES = ("red", "cat", "木")
seeds = st.integers(0, 2**20)
labellings = st.lists(st.sets(st.sampled_from((*NAMES, "other"))), min_size=4, max_size=25)
BRIGHT = [{"pixel_values": 1.5 + 0.3 * model_inputs(6, seed=i)["pixel_values"]} for i in range(2)]
DARK = [{"pixel_values": -1.5 + 0.3 * model_inputs(6, seed=i)["pixel_values"]} for i in range(2, 4)]
LABELS = [{"bright"} | ({"first"} if i < 6 else set()) for i in range(12)] + [{"dark"}] * 12


def activations(seed, n, d_sae=12):
    """Sparse z ≥ 0 of `n` images, of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d_sae, generator=generator).relu() * 10 ** (4 * torch.rand(d_sae, generator=generator) - 3)
    return z * (torch.rand(n, d_sae, generator=generator) < 0.5)


def assert_same(one, other):
    assert one.n == other.n
    assert torch.equal(one.fired_f, other.fired_f)
    for name in ("sum_f", "squares_f"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-12)
    assert (one.histogram_bf is None) == (other.histogram_bf is None)
    assert one.histogram_bf is None or torch.equal(one.histogram_bf, other.histogram_bf)


def assert_identical(one, other):
    assert (one.n, one.source) == (other.n, other.source)
    for name in ("sum_f", "squares_f", "fired_f", "histogram_bf"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert mine is theirs is None or torch.equal(mine, theirs)


# One pass. -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("histograms", [False, True])
@given(seed=seeds, labels=labellings, batch=st.integers(1, 9), block=st.sampled_from([1, 24, 2**23]))
def test_one_pass_gives_the_sets_of_every_concept(monkeypatch, histograms, seed, labels, batch, block):
    monkeypatch.setattr(statistics_module, "BLOCK", block)
    z = activations(seed, len(labels))
    found = accumulate_labelled(z.split(batch), labels, NAMES, histograms=histograms)
    assert_same(found.total, SetStatistics.of(z, histogram=histograms))
    for concept in NAMES:
        mask = torch.tensor([concept in names for names in labels])
        assert found.positives[concept].n == int(mask.sum())
        assert (concept in found) == (0 < int(mask.sum()) < len(labels))
        if concept in found:
            for part, rows in zip(found[concept], (z[mask], z[~mask]), strict=True):
                assert_same(part, SetStatistics.of(rows, histogram=histograms))
    assert list(found) == [concept for concept in NAMES if concept in found]
    assert len(dict(found)) == len(found)


def test_what_no_image_without_the_concept_has_is_nothing_and_not_its_rounding():
    z = torch.zeros(7, 2)
    z[:3, 0] = torch.tensor([0.1, 1e6, 0.3])
    z[:, 1] = 1
    _, negatives = accumulate_labelled([z[:2], z[2:]], [{"red"}] * 3 + [set()] * 4, ["red"])["red"]
    assert negatives.sum_f[0] == 0 and negatives.squares_f[0] == 0
    assert negatives.sum_f[1] == 4


def test_a_rare_feature_still_counts_after_many_images():
    # In float32 the million would swallow every one of them.
    many = replace(SetStatistics.of(torch.ones(1, 1)), n=10**9, sum_f=torch.tensor([1e9], dtype=torch.float64))
    for _ in range(100):
        many = many + SetStatistics.of(torch.full((1, 1), 0.01))
    assert float(many.sum_f) == pytest.approx(1e9 + 1, abs=1e-4)


def test_means_over_all_images_are_those_of_the_two_sets_together():
    z = activations(0, 20)
    positives, negatives = accumulate_labelled([z], [{"red"}] * 6 + [set()] * 14, ["red"])["red"]
    torch.testing.assert_close(positives.mean_f, z[:6].double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close((positives + negatives).mean_f, z.double().mean(0), rtol=1e-12, atol=0)


def test_a_string_is_one_label():
    found = accumulate_labelled([activations(0, 3)], ["red", "infrared", "cat"], ["red", "r"])
    assert (found.positives["red"].n, found.positives["r"].n) == (1, 0)


@pytest.mark.parametrize("labels", [[{"red"}] * 3, [set()] * 3])
def test_asking_for_a_concept_on_all_images_or_none_is_an_error(labels):
    found = accumulate_labelled([activations(0, 3)], labels, ["red"])
    assert "red" not in found
    with pytest.raises(ContrastError, match="of the 3 images show 'red'"):
        found["red"]


def test_a_concept_that_was_not_counted_is_answered_with_the_nearest():
    with pytest.raises(UnknownConceptError, match="Did you mean 'orange'"):
        accumulate_labelled([activations(0, 3)], [set(), {"orange"}, set()], ["orange", "red"])["ornage"]


def test_labels_that_do_not_match_the_images_and_no_labels_at_all_are_errors():
    with pytest.raises(ContrastError, match="3 images could be read, and there are 4 labels"):
        accumulate_labelled([activations(0, 3)], [set()] * 4, ["red"])
    with pytest.raises(ContrastError, match="no concept to count"):
        accumulate_labelled([activations(0, 3)], [set()] * 3, [])


# Parts. --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("histograms", [False, True])
@given(seed=seeds, labels=labellings, cuts=st.lists(st.integers(1, 24), max_size=4), order=st.randoms())
def test_parts_of_the_images_add_up_in_any_order(histograms, seed, labels, cuts, order):
    z = activations(seed, len(labels))
    edges = [0, *sorted({cut for cut in cuts if cut < len(labels)}), len(labels)]
    parts = []
    for start, end in itertools.pairwise(edges):
        names = list(NAMES)
        order.shuffle(names)
        parts.append(accumulate_labelled([z[start:end]], labels[start:end], names, histograms=histograms))
    order.shuffle(parts)
    merged, whole = sum(parts), accumulate_labelled([z], labels, NAMES, histograms=histograms)
    assert_same(merged.total, whole.total)
    assert set(merged) == set(whole)
    for concept in whole:
        for part, expected in zip(merged[concept], whole[concept], strict=True):
            assert_same(part, expected)
            assert part.digest() == expected.digest()


def test_a_digest_tells_other_images_apart():
    z = activations(0, 9)
    digests = {SetStatistics.of(some).digest() for some in (z, z[:8], z[1:], activations(1, 9))}
    assert len(digests) == 4


def test_parts_that_counted_different_concepts_do_not_add_up():
    one, other = (accumulate_labelled([activations(0, 3)], [{"red"}] * 3, names) for names in (["red"], ["red", "cat"]))
    with pytest.raises(ContrastError, match="'cat' is in one of them only"):
        one + other


def test_parts_read_in_different_ways_do_not_add_up(model):
    sae, other_sae = make_vision_sae(model, seed=0), make_vision_sae(model, seed=1)
    one = set_statistics(model, sae, BRIGHT)
    assert (one + set_statistics(model, sae, DARK)).source == one.source
    for other, said in (
        (set_statistics(model, sae, DARK, pool="max"), "pool='max', not 'mean'"),
        (set_statistics(model, sae, DARK, pool="class"), "tokens='class'"),
        (set_statistics(model, other_sae, DARK), "another SAE"),
        (set_statistics(model, make_vision_sae(model, d_sae=50), DARK), "features"),
    ):
        with pytest.raises(ContrastError, match=said):
            one + other


# Files. --------------------------------------------------------------------------------------------------------------


@given(seed=seeds, histogram=st.booleans())
def test_a_set_that_is_loaded_is_the_one_saved(seed, histogram, tmp_path_factory):
    path = tmp_path_factory.mktemp("statistics") / "red.safetensors"
    part = SetStatistics.of(activations(seed, 5), histogram=histogram)
    part.save(path)
    assert_identical(SetStatistics.load(path), part)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


names_of_concepts = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=9), min_size=1, max_size=5, unique=True
)


@given(seed=seeds, names=names_of_concepts, histograms=st.booleans(), data=st.data())
def test_labelled_statistics_that_are_loaded_are_those_saved(seed, names, histograms, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("statistics") / "part.safetensors"
    labels = data.draw(st.lists(st.sets(st.sampled_from(names)), min_size=1, max_size=9))
    saved = accumulate_labelled([activations(seed, len(labels))], labels, names, histograms=histograms)
    saved.save(path)
    loaded = LabelledStatistics.load(path)
    assert_identical(loaded.total, saved.total)
    assert list(loaded.positives) == names
    for name in names:
        assert_identical(loaded.positives[name], saved.positives[name])
    loaded.save(path)  # onto the file it came from
    assert_identical(LabelledStatistics.load(path).total, saved.total)


def test_one_concept_of_many_can_be_saved_alone(tmp_path):
    positives, _ = accumulate_labelled([activations(0, 4)], [{"red"}, {"cat"}, {"red"}, set()], ["red", "cat"])["red"]
    positives.save(tmp_path / "red")
    assert_identical(SetStatistics.load(tmp_path / "red"), positives)
    assert (tmp_path / "red").stat().st_size < 2000


def test_a_file_knows_the_sae(model, tmp_path):
    saved = set_statistics(model, make_vision_sae(model), BRIGHT)
    saved.save(tmp_path / "x")
    assert SetStatistics.load(tmp_path / "x").source == saved.source
    assert isinstance(saved.source, Source)
    with pytest.raises(ContrastError, match="another SAE"):
        SetStatistics.load(tmp_path / "x") + set_statistics(model, make_vision_sae(model, seed=1), BRIGHT)


def labelled():
    return accumulate_labelled([activations(0, 4)], [{"red"}, {"cat"}, {"red"}, set()], ["red", "cat"])


def rewritten(path, header=None, tensors=None):
    """A file with its header or tensors changed."""
    with safe_open(path, "pt") as file:
        record, held = json.loads(file.metadata()["statistics"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if header:
        header(record)
    save_file({**held, **(tensors or {})}, path, {"statistics": json.dumps(record)})


@pytest.mark.parametrize(
    ("header", "tensors"),
    [
        (lambda h: h.update(format=2), {}),
        (lambda h: h.pop("facts"), {}),
        (lambda h: h["facts"].update(n=-1), {}),
        (lambda h: h["facts"].update(n="4"), {}),
        (lambda h: h["facts"].update(n=5), {}),
        (lambda h: h["facts"].update(concepts=["red", "red"]), {}),
        (lambda h: h["facts"].update(concepts=["red", 3]), {}),
        (lambda h: h["facts"].update(concepts=["red"]), {}),
        (lambda h: h["facts"].update(counts=[2, 99]), {}),
        (lambda h: h["facts"].update(counts=None), {}),
        (lambda h: h["facts"].update(more=1), {}),
        (lambda h: h["facts"].update(source="here"), {}),
        (None, {"sum_f": torch.ones(2, 12, dtype=torch.float64)}),
        (None, {"sum_f": torch.ones(2, 12)}),
        (None, {"sum_f": torch.ones(2, 11, dtype=torch.float64)}),
        (None, {"sum_f": torch.ones(12, dtype=torch.float64)}),
        (None, {"more": torch.ones(1)}),
    ],
)
def test_a_file_that_was_changed_is_an_error(tmp_path, header, tensors):
    path = tmp_path / "part.safetensors"
    labelled().save(path)
    LabelledStatistics.load(path)
    rewritten(path)
    LabelledStatistics.load(path)  # so that what follows is due to the change
    rewritten(path, header, tensors)
    with pytest.raises(SAEFileError, match=r"part\.safetensors"):
        LabelledStatistics.load(path)


@pytest.mark.parametrize("content", [None, b"", b"noise" * 9, "set", "other"])
@pytest.mark.parametrize("kind", [SetStatistics, LabelledStatistics])
def test_what_is_no_file_of_statistics_is_an_error(tmp_path, kind, content):
    path = tmp_path / "x.safetensors"
    if content == "set":
        (labelled() if kind is SetStatistics else SetStatistics.of(activations(0, 3))).save(path)
    elif content == "other":
        save_file({"sum_f": torch.ones(3)}, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(SAEFileError, match=r"x\.safetensors"):
        kind.load(path)


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "part.safetensors"
    labelled().save(path)
    before = path.read_bytes()

    def full(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="disk full"):
        patched.setattr(os, "replace", full)
        SetStatistics.of(activations(0, 3)).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_and_a_name_that_is_no_text_are_errors(tmp_path):
    with pytest.raises(OSError, match="none"):
        labelled().save(tmp_path / "none" / "x")
    with pytest.raises(ContrastError, match="surrogate"):
        accumulate_labelled([activations(0, 2)], [{"\ud800"}, set()], ["\ud800"]).save(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


# Concepts from them. -------------------------------------------------------------------------------------------------


@pytest.fixture
def found(model, sae):
    return labelled_statistics(model, sae, [*BRIGHT, *DARK], LABELS)


def test_many_concepts_are_those_learnt_one_by_one(model, sae, found):
    many = learn_concepts(sae, found, k=5, gamma=-1.0)
    assert [concept.name for concept in many] == ["bright", "dark", "first"] == list(found)
    assert all(sae.concepts[concept.name] == concept for concept in many)
    assert sae.concepts["red"].features == (1, 2, 3)  # what was there stays
    bright = learn_concept(model, make_vision_sae(model), "bright", BRIGHT, DARK, k=5, gamma=-1.0)
    assert many[0].features == bright.features
    for name in ("scores", "means", "gates"):
        assert getattr(many[0], name) == pytest.approx(getattr(bright, name), rel=1e-5)
    assert many[0].provenance["pool"] == "mean" and many[0].provenance["positives"] == 12


def test_statistics_from_two_machines_give_the_concepts_of_all_images(model, sae, found, tmp_path):
    names = ["bright", "dark", "first"]
    halves = [([BRIGHT[0], DARK[0]], slice(0, 6), slice(12, 18)), ([BRIGHT[1], DARK[1]], slice(6, 12), slice(18, 24))]
    for i, (images, *where) in enumerate(halves):
        labels = [labels for part in where for labels in LABELS[part]]
        labelled_statistics(model, sae, images, labels, names).save(tmp_path / f"{i}.safetensors")
    merged = sum(LabelledStatistics.load(path) for path in sorted(tmp_path.iterdir()))
    assert learn_concepts(sae, merged, k=4)[0].features == learn_concepts(sae, found, k=4)[0].features
    assert merged["dark"][0].digest() == found["dark"][0].digest()


def test_auroc_needs_histograms_and_gets_them(model, sae, found):
    with pytest.raises(ContrastError, match="histograms=True"):
        learn_concepts(sae, found, scorer="auroc")
    with_histograms = labelled_statistics(model, sae, [*BRIGHT, *DARK], LABELS, histograms=True)
    assert learn_concepts(sae, with_histograms, ["bright"], scorer="auroc", k=3)[0].provenance["scorer"] == "auroc"


def test_of_concepts_that_cannot_all_be_learnt_none_is_stored(model, sae):
    before = dict(sae.concepts)
    found = labelled_statistics(model, sae, [*BRIGHT, *DARK], LABELS, ["bright", "unicorn"])
    with pytest.raises(ContrastError, match=r"1 of these concepts.*unicorn[\s\S]*0 of the 24 images show 'unicorn'"):
        learn_concepts(sae, found)
    assert dict(sae.concepts) == before
    assert [concept.name for concept in learn_concepts(sae, found, list(found))] == ["bright"]


def test_statistics_of_another_sae_and_unknown_names_and_scorers_are_errors(model, sae, found):
    with pytest.raises(SAEMismatchError, match="another SAE"):
        learn_concepts(make_vision_sae(model, seed=1), found)
    with pytest.raises(UnknownConceptError):
        learn_concepts(sae, found, ["brihgt"])
    with pytest.raises(ContrastError, match="unknown scorer 'best'"):
        learn_concepts(sae, found, scorer="best")
