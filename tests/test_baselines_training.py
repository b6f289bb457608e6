"""Unlearning by training: it does what its loss says, the original comes back bit for bit, and what was learnt is kept."""

from dataclasses import replace

import pytest
import torch

import families
from sauce_hooks import find_hook_point, scenes
from sauce_hooks.errors import DivergedError, EditError, ImagesError
from sauce_hooks.evaluation import AnsweredBatch, Probe, prepare_answers
from sauce_hooks.evaluation.baselines import (
    OBJECTIVES,
    ForgetRetain,
    Point,
    Retrained,
    Settings,
    Sweep,
    forget_retain,
    sweep,
    train,
)
from sauce_hooks.evaluation.baselines import training as module
from sauce_hooks.evaluation.baselines.losses import cross_entropy, kl_divergence
from sauce_hooks.evaluation.baselines.training import said_by
from sauce_hooks.evaluation.baselines.weights import make_student
from sauce_hooks.evaluation.store import fingerprint_of
from tiny import logits, model_inputs, pictures, snapshot, weights

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ("lora", "full")
LR = {"lora": 1e-2, "full": 1e-3}
DOMAIN = ("red", "blue", "green")
PICTURES = pictures(8)


@pytest.fixture(scope="module")
def data() -> ForgetRetain:
    holding = [Probe(image, frozenset({"red", "cat"})) for image in PICTURES[:4]]
    others = [Probe(image, frozenset({DOMAIN[1 + i % 2]})) for i, image in enumerate(PICTURES[4:])]
    said = ["a red cat.", "a thing."]
    return forget_retain("red", holding, others, DOMAIN, scenes.wording(), lambda probes: said[: len(probes)], ("no.",))


def settings(kind: str, **options) -> Settings:
    return Settings(**{"lr": LR[kind], "kind": kind, "steps": 3, "batch_size": 4, "rank": 4, **options})


def loss_of(model, answered, processor, of=cross_entropy) -> float:
    [batch] = prepare_answers(answered, processor)
    with torch.no_grad():
        return float(of(said_by(model, batch.inputs, batch.labels_bl)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", OBJECTIVES)
def test_training_does_what_its_loss_says_and_leaves_the_original_alone(model, processor, data, method, kind):
    kept, bare = weights(model), logits(model)
    rival = Retrained(model, processor, method, lambda concept: data, settings(kind, steps=5))
    forgotten, refused = (loss_of(model, part, processor) for part in (data.forget, data.refused))
    before = snapshot(model)
    rival.learn("red")
    assert snapshot(model) == before
    with rival("red"):
        assert not torch.equal(logits(model), bare)
        if method == "PO":
            assert loss_of(model, data.refused, processor) < refused - 0.05
        else:
            assert loss_of(model, data.forget, processor) > forgotten + 0.05
    assert torch.equal(logits(model), bare)
    assert snapshot(model) == before
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())


def test_the_retain_terms_retain(model, processor, data):
    """After the same steps GD has less loss on the retain set than GA, and KL is nearer to the original."""

    def student(method: str, **options):
        forget, retain = (prepare_answers(part, processor) for part in (data.forget, data.retain))
        return train(model, method, forget, retain, settings("full", steps=8, **options)).model

    original = prepare_answers(data.retain, processor)[0]
    with torch.no_grad():
        said = said_by(model, original.inputs, original.labels_bl).logits_av

    def divergence(found) -> float:
        return float(kl_divergence(replace(found, original_av=said)))

    ga = student("GA")
    assert loss_of(student("GD", weight=3.0), data.retain, processor) < loss_of(ga, data.retain, processor) - 0.05
    near, far = (loss_of(m, data.retain, processor, divergence) for m in (student("KL", weight=3.0), ga))
    assert near < far


@pytest.mark.parametrize("kind", KINDS)
def test_the_original_comes_back_after_an_exception(cold, processor, data, kind):
    model, before = cold, snapshot(cold)
    rival = Retrained(model, processor, "GA", lambda concept: data, settings(kind, steps=1))
    rival.learn("red")
    with pytest.raises(KeyboardInterrupt), rival("red"):
        raise KeyboardInterrupt
    assert snapshot(model) == before


def test_the_tower_stays_unless_it_is_asked_for(model):
    for kind, parts in ((k, p) for k in KINDS for p in ("language", "all")):
        names = make_student(model, kind=kind, parts=parts, rank=2, adapter="x").trained
        assert any("vision_tower" in name for name in names) == (parts == "all")
        assert any("multi_modal_projector" in name for name in names)
        assert any("language_model" in name for name in names)


def test_tied_weights_stay_tied():
    model, _ = scenes.load_model()
    student = make_student(model, kind="full", parts="language", rank=0, adapter="")
    tied = student.model.get_output_embeddings().weight
    assert tied is student.model.get_input_embeddings().weight
    assert tied.data_ptr() != model.get_output_embeddings().weight.data_ptr()
    with torch.no_grad():
        tied.add_(1)
    with student.inside(model):
        assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
        assert torch.equal(model.get_output_embeddings().weight, tied)


# Seeds and files. ----------------------------------------------------------------------------------------------------


def test_the_seed_decides(model, processor, data):
    batches = prepare_answers(data.forget, processor)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = [train(model, "GA", batches, [], settings("lora", steps=1, seed=seed)).tensors() for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not all(torch.equal(found[0][name], found[2][name]) for name in found[0])


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_learnt_is_kept_and_used_for_the_very_same_only(model, processor, data, kind, tmp_path, monkeypatch):
    trainings: list[str] = []

    def stand_in(model, method, forget, retain, settings, *, adapter):
        trainings.append(method)
        student = make_student(model, kind=settings.kind, parts=settings.parts, rank=settings.rank, adapter=adapter)
        with torch.no_grad():
            for p in student.trained.values():
                p.fill_(len(trainings))
        return student

    def tensors(concept: str = "red", of: ForgetRetain = data, method: str = "NPO", **options):
        return (
            Retrained(model, processor, method, lambda c: of, settings(kind, **options), tmp_path).learn(concept).tensors()
        )

    monkeypatch.setattr(module, "train", stand_in)
    for _ in range(2):
        assert all(bool((t == 1).all()) for t in tensors().values())
    assert trainings == ["NPO"]
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-100])  # cut short: it is made anew
    assert all(bool((t == 2).all()) for t in tensors().values())
    assert all(bool((t == 2).all()) for t in tensors().values())
    for change in (
        {"lr": 2e-3}, {"seed": 1}, {"concept": "../../blue"}, {"method": "GA"}, {"of": replace(data, retain=data.forget)}
    ):  # fmt: skip
        tensors(**change)
    assert len(trainings) == 7
    assert len({path.name for path in tmp_path.iterdir()}) == 6
    assert all(path.suffix == ".safetensors" for path in tmp_path.iterdir())
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    tensors()
    assert len(trainings) == 8


def test_weights_of_another_model_are_refused(model):
    student = make_student(model, kind="lora", parts="language", rank=2, adapter="a")
    other = make_student(model, kind="lora", parts="language", rank=3, adapter="a")
    with pytest.raises(EditError, match="not of this model"):
        student.load(other.tensors())


def test_equal_models_have_equal_fingerprints(model):
    from tiny import build_llava

    vocabulary = model.config.text_config.vocab_size
    assert (
        fingerprint_of(model) == fingerprint_of(build_llava(vocabulary)) != fingerprint_of(build_llava(vocabulary, seed=1))
    )


def test_divergence_is_said(model, processor, data):
    with pytest.raises(DivergedError, match="GA diverged at a learning rate of"):
        Retrained(model, processor, "GA", lambda c: data, settings("full", lr=1e38)).learn("red")


def test_unknown_methods_and_encoder_decoders_are_refused(model, processor, data):
    with pytest.raises(ValueError, match="unknown method 'GB'; known: GA"):
        Retrained(model, processor, "GB", lambda c: None, Settings(1e-3))
    with pytest.raises(ValueError, match="encoder-decoder"):
        train(families.build("florence2")[0], "GA", [], [], Settings(1e-3))
    some = prepare_answers(data.retain, processor)
    for sets, missing in (([], some), "forget"), ((some, []), "retain"):
        with pytest.raises(ImagesError, match=f"the {missing} set is empty: GD"):
            train(model, "GD", *sets, Settings(1e-3))


def test_without_peft_the_extra_is_named(model, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"sauce-hooks\[baselines\]"):
        make_student(model, kind="lora", parts="language", rank=2, adapter="x")
    make_student(model, kind="full", parts="language", rank=2, adapter="x")


# Any family. ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["qwen2_vl", "mllama"])
def test_any_family(name, kind):
    model, inputs = families.build(name)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    batch = AnsweredBatch(dict(inputs), labels, (0, 1))
    bare, kept = families.score(model, inputs), weights(model)
    student = train(model, "GD", [batch], [batch], settings(kind, steps=2, weight=0.5))
    assert find_hook_point(model).path.startswith(tuple(t.path for t in module_towers(model)))
    with student.inside(model):
        assert not torch.equal(families.score(model, inputs), bare)
    assert torch.equal(families.score(model, inputs), bare)
    assert all(torch.equal(kept[key], tensor) for key, tensor in model.state_dict().items())


def module_towers(model):
    from sauce_hooks.hookpoint import find_towers

    return find_towers(model)


# Learning rates. -----------------------------------------------------------------------------------------------------


def test_a_sweep_takes_the_rate_of_the_best_harmonic_mean():
    points = (
        Point(1e-3, "a", 0.1, 1.0), Point(1e-2, "a", 0.8, 0.8), Point(1e-1, "a", 1.0, 0.0),
        Point(1e-3, "b", 0.5, 0.5), Point(1e-2, "b", 0.5, 0.5), Point(1e-1, "b", 1.0, 1.0, diverged=True),
    )  # fmt: skip
    found = Sweep("GA", points)
    assert found.chosen == 1e-2 and not found.at_an_end
    assert found.merits[1e-2] == pytest.approx((0.8 + 0.5) / 2)
    assert found.merits[1e-1] == 0
    assert replace(found, points=points[:1]).at_an_end
    frame = found.to_frame()
    assert len(frame) == 6 and frame.chosen.sum() == 2


def test_a_sweep_measures_every_rate_and_notes_divergence(model, processor, data):
    shown = {"red": [Probe(image, frozenset({"red"})) for image in PICTURES[:2]]}
    blue = {"blue": [Probe(image, frozenset({"blue"})) for image in PICTURES[2:4]]}
    probes = replace(
        scenes.probes(0, retained=0, negatives=0),
        domains={"color": ("red", "blue"), "object": ("cat",)},
        positives={**shown, "blue": [], "cat": []},
        retained={**shown, **blue, "cat": [Probe(PICTURES[5], frozenset({"cat"}))]},
        negatives={"red": blue["blue"], "blue": [], "cat": []},
    )
    candidates = {
        "GA": {
            lr: Retrained(model, processor, "GA", lambda c: data, settings("full", lr=lr, steps=1)) for lr in (1e-4, 1e38)
        }
    }
    before = snapshot(model)
    found = sweep(model, candidates, probes, ["red"], processor=processor, progress=False)["GA"]
    assert [(point.lr, point.concept, point.diverged) for point in found.points] == [
        (1e-4, "red", False),
        (1e38, "red", True),
    ]
    assert all(0 <= point.forgetting <= 1 and 0 <= point.retention <= 1 for point in found.points)
    assert snapshot(model) == before


def test_the_model_says_what_it_said(model):
    """The fixtures' inputs reach the language side: otherwise nothing above would mean anything."""
    assert not torch.equal(logits(model), logits(model, model_inputs(seed=1)))
