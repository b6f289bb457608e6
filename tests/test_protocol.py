"""The protocol: splits that never mix, what labels say, words as data, runs that go on, judges, methods with own words."""

import json
import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sauce_hooks import evaluate, scenes
from sauce_hooks.errors import (
    EvaluationError,
    EvaluationWarning,
    ImagesError,
    ProbeError,
    ResumeError,
    UnknownConceptError,
    UnreadableImageWarning,
)
from sauce_hooks.evaluation import (
    CHINESE,
    HELD_OUT,
    ORIGINAL,
    PHRASINGS,
    LabelledImages,
    Probe,
    ProbeSet,
    Question,
    Wording,
    ask,
    prepare,
    wording,
)
from sauce_hooks.evaluation.answers import read_yes_no
from sauce_hooks.evaluation.labelled import SHARES, split_of
from tiny import build_llava, make_vision_sae, pictures

SPLITS = tuple(SHARES)
WORDS = Wording(yes_no="is there {}?".format, describe=lambda: "describe.")


def fill(folder, n, seed, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures(n, seed)):
        picture.save(folder / f"{i}.{suffix}")
    return folder


@pytest.fixture
def photos(tmp_path):
    """Two domains of two concepts, thirty images each."""
    root = tmp_path / "photos"
    for i, place in enumerate(("object/tiger", "object/wall_clock", "color/red", "color/blue")):
        fill(root / place, 30, i)
    return root


def names(probes):
    return {probe.name for probe in probes}


# Splits. -------------------------------------------------------------------------------------------------------------


def test_no_image_is_in_two_splits_whatever_it_is_asked_for(photos):
    """Contrast images, validation and test images of every concept, in any combination, share no content."""
    Image.open(photos / "object" / "tiger" / "0.png").save(photos / "object" / "wall_clock" / "copy.png")
    labelled = LabelledImages.from_folder(photos, absent="domain")
    of_split = {}
    for split in SPLITS:
        probes = labelled.probes(WORDS, split=split, n=100, retained=100)
        found = set()
        for table in (probes.positives, probes.retained, probes.negatives):
            for some in table.values():
                found |= names(some)
        of_split[split] = found
    assert all(of_split.values())
    for one in SPLITS:
        for other in SPLITS:
            assert one == other or of_split[one].isdisjoint(of_split[other])
    assert set().union(*of_split.values()) == {image.picture.name for image in labelled.images}
    by_path = {image.picture.path: image.picture.name for image in labelled.images}
    for concept in ("tiger", "red"):
        for some in labelled.contrast(concept):
            assert {by_path[path] for path in some} <= of_split["train"]


@given(st.binary(min_size=32, max_size=32))
def test_a_split_depends_on_the_content_alone(content):
    assert split_of(content.hex()) in SPLITS
    assert split_of(content.hex()) == split_of(content.hex().upper())


def test_splits_have_their_shares():
    import hashlib

    found = [split_of(hashlib.sha256(str(i).encode()).hexdigest()) for i in range(3000)]
    assert {split: found.count(split) / 3000 for split in SPLITS} == pytest.approx(dict(SHARES), abs=0.03)


def test_renamed_moved_and_added_images_leave_every_other_where_it_was(photos):
    before = {i.picture.name: i.split for i in LabelledImages.from_folder(photos).images}
    (photos / "object" / "tiger" / "3.png").rename(photos / "object" / "tiger" / "zzz.png")
    fill(photos / "object" / "car", 5, 99)
    after = {i.picture.name: i.split for i in LabelledImages.from_folder(photos).images}
    assert before.items() <= after.items()
    assert len(after) == len(before) + 5


def test_the_bundled_worlds_splits_share_no_scene():
    found = {split: scenes.probes(2, retained=1, split=split) for split in ("val", "test")}
    shown = [
        {p.name for table in (s.positives, s.retained, s.negatives) for some in table.values() for p in some}
        for s in found.values()
    ]
    assert shown[0].isdisjoint(shown[1])


# What labels say. ----------------------------------------------------------------------------------------------------


def test_what_is_absent_must_be_declared(photos):
    unknown, domain, complete = (LabelledImages.from_folder(photos, absent=a) for a in ("unknown", "domain", "all"))
    assert unknown.domains == {"color": ("blue", "red"), "object": ("tiger", "wall clock")}
    assert not any(unknown.probes(WORDS).negatives.values())
    with pytest.raises(ProbeError, match='declare absent="domain"'):
        unknown.contrast("tiger")
    lacking = domain.probes(WORDS, n=100).negatives["tiger"]
    assert {concept for probe in lacking for concept in probe.concepts} == {"wall clock"}
    everything = complete.probes(WORDS, n=100).negatives["tiger"]
    assert {concept for probe in everything for concept in probe.concepts} == {"wall clock", "red", "blue"}
    (probe,) = domain.probes(WORDS, n=1).positives["tiger"]
    assert (probe.concepts, probe.known) == ({"tiger"}, {"tiger", "wall clock"})
    assert probe.lacks("wall clock")
    assert not probe.lacks("red")


def test_positives_and_negatives_of_a_concept_are_different_images(photos):
    probes = LabelledImages.from_folder(photos, absent="all").probes(WORDS, n=100, retained=2)
    for concept in probes.concepts:
        assert names(probes.positives[concept]).isdisjoint(names(probes.negatives[concept]))
        assert all(p.lacks(concept) for p in probes.negatives[concept])
        assert len(probes.retained[concept]) == 2


def test_images_are_opened_when_they_are_asked_about_and_not_before(photos, processor, monkeypatch):
    probes = LabelledImages.from_folder(photos, absent="all").probes(scenes.wording(), n=4, retained=1)
    opened = []
    of_file = type(probes.positives["tiger"][0].source)
    original = of_file.open
    monkeypatch.setattr(of_file, "open", lambda self: opened.append(self.path) or original(self))
    some = [Question(p, "yes_no", "tiger") for p in probes.positives["tiger"]]
    batches = prepare(some, scenes.wording(), processor, 2)
    assert not opened
    _ = batches[0].inputs
    assert len(opened) == 2
    _ = batches[0].inputs
    assert len(opened) == 2  # kept
    tight = prepare(some, scenes.wording(), processor, 2, keep_bytes=0)
    _ = tight[0].inputs, tight[0].inputs
    assert len(opened) == 6  # no room: made again


def test_damaged_files_are_skipped_and_named(photos):
    (photos / "color" / "red" / "broken.png").write_bytes(b"no image")
    with pytest.warns(UnreadableImageWarning, match=r"skipped 1 of 121.*broken\.png"):
        assert len(LabelledImages.from_folder(photos).images) == 120


def test_a_folder_that_is_none_is_an_error(tmp_path, photos):
    with pytest.raises(ImagesError, match="no such folder"):
        LabelledImages.from_folder(tmp_path / "nothing")
    fill(photos / "loose", 1, 50)
    with pytest.raises(ProbeError, match="loose"):
        LabelledImages.from_folder(photos)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImagesError, match="no image files"):
        LabelledImages.from_folder(tmp_path / "empty")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_gives_an_image_several_concepts(tmp_path, kind):
    fill(tmp_path, 2, 0)
    rows = [("0.png", ["tiger", "red"], ["cat"]), ("1.png", ["cat"], [])]
    table = tmp_path / f"labels.{kind}"
    if kind == "csv":
        table.write_text("image,concepts,absent\n" + "".join(f"{i},{';'.join(c)},{';'.join(a)}\n" for i, c, a in rows))
    else:
        table.write_text("".join(json.dumps({"image": i, "concepts": c, "absent": a}) + "\n" for i, c, a in rows))
    first, second = LabelledImages.from_table(table).images
    assert (first.concepts, first.missing, second.concepts) == ({"tiger", "red"}, {"cat"}, {"cat"})
    found = LabelledImages.from_table(table, domains={"object": ("tiger", "cat"), "color": ("red",)}, absent="domain")
    assert found.known(second) == {"tiger", "cat"}
    with pytest.raises(UnknownConceptError, match="red"):
        LabelledImages.from_table(table, domains={"object": ("tiger", "cat")})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "../secret.png", "concepts": ["x"]}, "leads out"),
        ({"image": "0.png"}, "`concepts` are needed"),
        ([1], "no JSON object"),
    ],
)
def test_a_table_that_is_wrong_is_an_error(tmp_path, row, said):
    fill(tmp_path / "in", 1, 0)
    (tmp_path / "in" / "labels.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ProbeError, match=said):
        LabelledImages.from_table(tmp_path / "in" / "labels.jsonl")


def test_a_hugging_face_dataset_and_its_class_labels():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["n01", "cat"])})
    data = datasets.Dataset.from_dict({"image": pictures(40), "label": [i % 2 for i in range(39)] + [-1]}, features=features)
    found = LabelledImages.from_dataset(data, absent="all", names={"n01": "tiger"})
    assert found.domains == {"concept": ("cat", "tiger")}
    assert len(found.images) == 39  # one has no label
    probes = found.probes(WORDS, split="train")
    assert probes.positives["tiger"][0].image.size == pictures(1)[0].size
    holding, lacking = found.contrast("tiger")
    assert (len(holding) + len(lacking), holding[0].mode) == (len([i for i in found.images if i.split == "train"]), "RGB")
    several = datasets.Dataset.from_dict(
        {"image": pictures(3), "labels": [[0, 1], [1], []]},
        features=datasets.Features({"image": datasets.Image(), "labels": datasets.List(features["label"])}),
    )
    assert [i.concepts for i in LabelledImages.from_dataset(several).images] == [{"n01", "cat"}, {"cat"}]
    with pytest.raises(ProbeError, match=r"no column of labels.*image"):
        LabelledImages.from_dataset(several.remove_columns("labels"))


def test_the_same_picture_in_two_folders_has_both_labels(tmp_path):
    fill(tmp_path / "tiger", 2, 0)
    fill(tmp_path / "red", 1, 0)  # the same picture as the first tiger
    found = LabelledImages.from_folder(tmp_path)
    assert sorted(sorted(image.concepts) for image in found.images) == [["red", "tiger"], ["tiger"]]


# Words. --------------------------------------------------------------------------------------------------------------


class Processor:
    image_token, chat_template = "<image>", "a template"

    def apply_chat_template(self, messages, add_generation_prompt):
        return f"[{messages[0]['content'][1]['text']}]"


def test_the_papers_prompts_are_the_first():
    found = wording(Processor())
    assert found.yes_no("tiger") == "[Does this image contain tiger? Please answer with Yes or No.]"
    assert found.describe() == "[Please describe in detail all the objects present in this image.]"


def test_every_phrasing_is_another_and_has_room_for_the_concept():
    for prompts in PHRASINGS.values():
        for some in (prompts.yes_no, prompts.describe):
            assert len(some) == len(set(some)) >= 3
        assert all(prompt.count("{}") == 1 for prompt in prompts.yes_no)
        assert not set(prompts.yes) & set(prompts.no)
    assert wording(Processor(), phrasing=HELD_OUT).yes_no("x") not in [
        wording(Processor(), phrasing=i).yes_no("x") for i in range(3)
    ]


def test_chinese_asks_and_reads_in_chinese():
    zh = wording(Processor(), language="zh", names={"okapi": "霍加狓"})
    assert "老虎" in zh.yes_no("tiger")
    assert zh.mentions("草地上有一只老虎。", "tiger")
    assert not zh.mentions("草地上有一只猫。", "tiger")
    assert "霍加狓" in zh.yes_no("okapi")
    with pytest.raises(ProbeError, match="'zebra' has no name in 'zh'"):
        zh.yes_no("zebra")
    said = {
        "是": "yes",
        "是的，图中有": "yes",
        "有。": "yes",
        "不是": "no",
        "没有": "no",
        "否。": "no",
        "Yes": "invalid",
        "抱歉": "refusal",
    }
    assert {text: read_yes_no(text, zh) for text in said} == said
    assert read_yes_no("是", wording(Processor())) == "invalid"


def test_table_1_is_named_in_chinese():
    assert len(CHINESE) == 60
    assert all(found and not any(name.isascii() for name in found) for found in CHINESE.values())
    first = [found[0] for found in CHINESE.values()]
    assert len(set(first)) == 60  # no two concepts are asked for in the same words


@pytest.mark.parametrize("options", [{"language": "tlh"}, {"phrasing": 4}, {"phrasing": -9}])
def test_words_that_do_not_exist_are_an_error(options):
    with pytest.raises(ProbeError, match=r"there are en, zh|0 to 3"):
        wording(Processor(), **options)


# evaluate. -----------------------------------------------------------------------------------------------------------

WORLD = {"object": ("tiger", "cat"), "color": ("red", "blue")}
OTHER = {"tiger": "red", "cat": "blue", "red": "cat", "blue": "tiger"}


@pytest.fixture
def talker(processor):
    return build_llava(len(processor.tokenizer))


@pytest.fixture
def probes():
    def some(seed, concept, *more):
        return [Probe(image, frozenset({concept, *more})) for image in pictures(2, seed)]

    return ProbeSet(
        WORLD,
        {c: some(i, c, OTHER[c]) for i, c in enumerate(OTHER)},
        {c: some(10 + i, c) for i, c in enumerate(OTHER)},
        {c: some(20 + i, OTHER[c]) for i, c in enumerate(OTHER)},
        scenes.wording(),
    )


class Calls:
    """A method that does nothing but count for whom it is called."""

    def __init__(self, fails=()):
        self.seen, self.fails = [], fails

    def __call__(self, concept):
        self.seen.append(concept)
        if concept in self.fails:
            raise RuntimeError(f"no {concept} today")
        return nullcontext()


def run(model, probes, processor, methods, concepts=("tiger", "red"), **options):
    options = {"batch_size": 8, "progress": False, **options}
    return evaluate(model, None, probes, concepts, processor=processor, methods=methods, **options)


def shown(results):
    return results.to_frame().astype(str).to_dict()


def test_a_run_that_is_cut_off_goes_on_and_ends_as_if_it_had_not_been(talker, probes, processor, tmp_path):
    whole = run(talker, probes, processor, {"a": Calls(), "b": Calls()})

    class Cut(Calls):
        def __call__(self, concept):
            if concept == "red":
                raise KeyboardInterrupt
            return super().__call__(concept)

    with pytest.raises(KeyboardInterrupt):
        run(talker, probes, processor, {"a": Calls(), "b": Cut()}, out=tmp_path)
    a, b = Calls(), Calls()
    found = run(talker, probes, processor, {"a": a, "b": b}, out=tmp_path)
    assert (a.seen, b.seen) == ([], ["red"])
    assert shown(found) == shown(whole)
    assert found.summary().equals(whole.summary())
    assert [(e.erased, e.method, e.answer.text) for e in found.examples] == [
        (e.erased, e.method, e.answer.text) for e in whole.examples
    ]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_folder_of_another_evaluation_is_refused(talker, probes, processor, tmp_path):
    run(talker, probes, processor, {}, ["tiger"], out=tmp_path)
    with pytest.raises(ResumeError, match="wording"):
        run(talker, replace(probes, wording=scenes.wording(1)), processor, {}, ["tiger"], out=tmp_path)
    with pytest.raises(ResumeError, match="probes"):
        run(talker, replace(probes, retained={**probes.retained, "cat": ()}), processor, {}, ["tiger"], out=tmp_path)
    with pytest.raises(ResumeError, match="model"):
        run(build_llava(len(processor.tokenizer), seed=1), probes, processor, {}, ["tiger"], out=tmp_path)
    one, other = Calls(), Calls()
    one.settings, other.settings = {"gamma": -1}, {"gamma": -2}
    run(talker, probes, processor, {"a": one}, ["tiger"], out=tmp_path)
    with pytest.raises(ResumeError, match="'a' had other settings"):
        run(talker, probes, processor, {"a": other}, ["tiger"], out=tmp_path)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "x").write_text("mine")
    with pytest.raises(ResumeError, match="holds no evaluation"):
        run(talker, probes, processor, {}, ["tiger"], out=tmp_path / "more")
    for part in (tmp_path / "scores").rglob("*.json"):
        part.write_text('{"about": null}')
    with pytest.raises(ResumeError, match="remove it"):
        run(talker, probes, processor, {}, ["tiger"], out=tmp_path)


def test_names_of_methods_lead_out_of_no_folder(talker, probes, processor, tmp_path):
    run(talker, probes, processor, {"../../x": Calls(), "..": Calls()}, ["tiger"], out=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert len(list((tmp_path / "out").rglob("tiger-*.json"))) == 3


def test_a_failing_method_loses_nothing_else(talker, probes, processor, tmp_path):
    with pytest.warns(EvaluationWarning, match="bad, red: RuntimeError: no red today"):
        found = run(talker, probes, processor, {"bad": Calls(fails=["red"]), "good": Calls()}, out=tmp_path)
    assert set(found.scores) == {(m, c) for m in (ORIGINAL, "bad", "good") for c in ("tiger", "red")} - {("bad", "red")}
    assert "Failed: bad, red: RuntimeError: no red today" in found.to_markdown()
    again = Calls()
    run(talker, probes, processor, {"bad": again, "good": Calls()}, out=tmp_path)
    assert again.seen == ["red"]
    with pytest.raises(EvaluationError, match=r"every erasure failed.*no tiger today"):
        run(talker, probes, processor, {"bad": Calls(fails=["tiger", "red"])})


def test_a_concept_without_images_is_an_error(talker, probes, processor):
    with pytest.raises(ProbeError, match=r"no image of the probe set holds 'tiger'.*cat 2"):
        run(talker, replace(probes, positives={**probes.positives, "tiger": ()}), processor, {})


class Strict:
    """A judge that finds every concept in every text, but cannot say of red."""

    name = "strict 1"
    note = "agrees with people in 84% of cases"

    def __call__(self, texts, concept):
        return [None if concept == "red" else True] * len(texts)


def test_a_judge_decides_what_descriptions_name(talker, probes, processor):
    found = run(talker, probes, processor, {}, judge=Strict(), eligibility=None)
    assert found.scores[ORIGINAL, "tiger"]["UA_g"].value == 0
    assert found.scores[ORIGINAL, "red"]["UA_g"].value == 0
    assert found.scores[ORIGINAL, "tiger"]["SRA_g"].value == 0
    assert found.scores[ORIGINAL, "red"]["SRA_g"].value == 1
    assert found.judge == "strict 1"
    assert {"Descriptions were judged by strict 1.", Strict.note} <= set(found.notes)


def test_a_judge_without_a_name_is_none(talker, probes, processor):
    with pytest.raises(TypeError, match="name"):
        run(talker, probes, processor, {}, judge=lambda texts, concept: [True] * len(texts))
    with pytest.raises(ValueError, match="another name"):
        run(talker, probes, processor, {ORIGINAL: Calls()})


def test_a_run_is_not_gone_on_with_after_the_bank_has_changed(talker, probes, processor, tmp_path):
    sae = make_vision_sae(talker)
    options = {"processor": processor, "progress": False, "out": tmp_path / "run"}
    evaluate(talker, sae, probes, ["tiger"], **options)
    evaluate(talker, sae, probes, ["tiger"], **options)
    sae.concepts.add(replace(sae.concepts["tiger"], gamma=-7.0))
    with pytest.raises(ResumeError, match="other settings"):
        evaluate(talker, sae, probes, ["tiger"], **options)


def test_a_name_of_two_domains_is_refused(tmp_path):
    for folder in ("object/orange", "color/orange"):
        (tmp_path / folder).mkdir(parents=True)
        pictures(1)[0].save(tmp_path / folder / "0.png")
    with pytest.raises(ProbeError, match="orange: in two domains"):
        LabelledImages.from_folder(tmp_path)


def test_a_method_may_ask_in_other_words(talker, probes, processor, monkeypatch):
    asked = []
    plain = type(processor).__call__
    monkeypatch.setattr(
        type(processor), "__call__", lambda self, *a, **k: asked.extend(k.get("text", ())) or plain(self, *a, **k)
    )

    class Told(Calls):
        def wording(self, wording, concept):
            return replace(wording, describe=lambda: f"{wording.describe()} no {concept}")

    run(talker, probes, processor, {"told": Told(), "plain": Calls()}, ["tiger"])
    told = [text for text in asked if text.endswith(" no tiger")]
    assert len(told) == 2  # the two images, for this method only
    assert sum(text == probes.wording.describe() for text in asked) == 2


def test_answers_in_another_script_are_invalid_and_noted(talker, probes, processor, monkeypatch):
    from sauce_hooks.evaluation import run as running

    def chinese(*args):
        yield from (replace(a, text="是的", status="invalid") for a in ask(*args))

    monkeypatch.setattr(running, "ask", chinese)
    found = run(talker, probes, processor, {}, ["tiger"])
    assert any(re.search(r"another script.*'是的'", note) for note in found.notes)


def test_the_statuses_are_in_the_frame(talker, probes, processor):
    frame = run(talker, probes, processor, {}, ["tiger"]).to_frame().set_index("metric")
    row = frame.loc["invalid"]
    assert row[["correct", "wrong", "refusal", "invalid"]].sum() == row["n"]


def test_a_model_that_knows_nothing_is_left_out(talker, probes, processor):
    found = run(talker, probes, processor, {})
    assert set(found.left_out) == {"tiger", "red"}
    assert "not measured" in found.to_markdown()
    assert set(run(talker, probes, processor, {}, eligibility=None).left_out) == set()
