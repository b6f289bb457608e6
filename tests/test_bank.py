import hashlib
import json
import math
import os
import re
import shutil
import struct
import unicodedata
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes

import sauce_hooks
from sauce_hooks import Concept, ConceptBank, TokenPolicy, VisionSAE
from sauce_hooks.bank import BankDiff, CurvePoint, Effect, Projection, Rate, Subspace
from sauce_hooks.bank.card import LONGEST, bank_card, concepts_section, escaped
from sauce_hooks.bank.format import _CONCEPT, is_tensors_file
from sauce_hooks.errors import EditError, SAEFileError, SAEMismatchError, UnknownConceptError
from sauce_hooks.sae import FeatureStats
from sauce_hooks.sae.card import sae_card
from sauce_hooks.sae.provenance import digest, provenance_of, record_sae
from tiny import D_IN, D_SAE, make_sae

HOSTILE = [
    "", "../../x", "/etc/passwd", "C:\\x", "a/b", "a\0b", ".", "..", "concepts.json", "0", "__metadata__", "con", "é",
    unicodedata.normalize("NFD", "é"), "n" * 10_000, "\u202ereversed", "a\nb", "\u2028", '"},{"',
    "<script>alert(1)</script>", "$(touch x)", "👩‍👩‍👧‍👦", "虎", "tiger | cat", "`x`", "![x](http://x.test/y.png)",
]  # fmt: skip


# Any bank. -----------------------------------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(max_size=6)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
shares = finite | st.just(math.nan)
rates = st.builds(Rate, shares, st.integers(0, 10**6), shares, shares)
figures = st.dictionaries(texts, rates, max_size=2)
effects = st.builds(
    Effect,
    texts,
    figures,
    figures,
    st.lists(st.builds(CurvePoint, st.integers(0, 99), finite, texts, figures, st.booleans()), max_size=2).map(tuple),
)


def directions(r: int, d: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Orthonormal rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, r, generator=generator, dtype=torch.float64))[0].T.to(dtype)


dtypes = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
sizes = st.integers(1, 6).flatmap(lambda d: st.tuples(st.integers(0, d), st.just(d)))


@st.composite
def subspaces(draw):
    basis_rd = directions(*draw(sizes), draw(st.integers(0, 99)), draw(dtypes))
    if draw(st.booleans()):
        return Subspace(basis_rd, draw(st.booleans()))
    return Subspace(basis_rd * 4, draw(st.booleans()), basis_rd / 4)


@st.composite
def projections(draw):
    (r, d), seed, dtype = draw(sizes), draw(st.integers(0, 99)), draw(dtypes)
    left_rd = directions(r, d, seed, dtype)
    oblique = torch.linalg.pinv(left_rd.double() * 3).T.to(dtype) if draw(st.booleans()) and r else None
    center_d = torch.randn(d, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return Projection(left_rd, left_rd, center_d) if oblique is None else Projection(left_rd * 3, oblique, center_d)


@st.composite
def concepts(draw):
    features = tuple(draw(st.lists(st.integers(0, 10_000), unique=True, max_size=4)))
    values = st.just(()) | st.tuples(*[finite] * len(features))
    return Concept(
        name=draw(st.text(max_size=4) | st.sampled_from(HOSTILE)),
        features=features,
        scores=draw(values),
        gamma=draw(st.none() | finite),
        edit=draw(st.none() | texts | st.sampled_from(["scale", "project", "an edit of a later version"])),
        means=draw(values),
        gates=draw(values),
        share=draw(st.floats(0, 1)),
        keep_norm=draw(st.booleans()),
        subspace=draw(st.none() | subspaces()),
        projection=draw(st.none() | projections()),
        provenance=draw(st.dictionaries(texts, json_values, max_size=2)),
        effect=draw(st.none() | effects),
    )


banks = st.lists(concepts(), max_size=3).map(ConceptBank)


def everything(bank: ConceptBank) -> list:
    """All of a bank, as what can be compared: NaN is equal to itself."""

    def plain(value):
        return (value.dtype, value.shape, value.tolist()) if isinstance(value, torch.Tensor) else value

    def parts(value):
        if hasattr(value, "__dataclass_fields__"):
            return [parts(getattr(value, f.name)) for f in fields(value)]
        return plain(value)

    return [repr(parts(concept)) for concept in bank.values()]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Saving and loading. -------------------------------------------------------------------------------------------------


@given(bank=banks)
@settings(max_examples=60)
def test_a_bank_that_is_loaded_is_the_one_saved(bank, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank")
    bank.save(folder / "it")
    found = ConceptBank.load(folder / "it")
    assert found == bank
    assert everything(found) == everything(bank)
    assert not bank.diff(found)
    assert [path.name for path in folder.iterdir()] == ["it"]
    has_tensors = any(c.subspace or c.projection for c in bank.values())
    names = sorted(files(folder / "it"))
    assert len(names) == 1 + has_tensors and names[-1] == "concepts.json" and all(map(is_tensors_file, names[:-1]))
    json.loads((folder / "it" / "concepts.json").read_bytes(), parse_constant=lambda _: pytest.fail("no strict JSON"))


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_leads_out_of_the_folder(name, tmp_path):
    folder = tmp_path / "a" / "b" / "bank"
    rows = [directions(2, D_IN, i) for i in range(2)]
    bank = ConceptBank([Concept(n, (1,), subspace=Subspace(r, True)) for n, r in zip([name, "other"], rows, strict=True)])
    bank.save(folder)
    assert {path.relative_to(tmp_path).parts[:3] for path in tmp_path.rglob("*") if path.is_file()} == {("a", "b", "bank")}
    assert len(files(folder)) == 2
    found = ConceptBank.load(folder)
    assert list(found) == [name, "other"]
    assert [torch.equal(found[n].subspace.basis_rd, r) for n, r in zip(found, rows, strict=True)] == [True, True]


def test_names_that_look_alike_are_two_concepts(tmp_path):
    composed = "é"
    bank = ConceptBank([Concept(composed, (1,)), Concept(unicodedata.normalize("NFD", composed), (2,))])
    bank.save(tmp_path)
    assert [c.features for c in ConceptBank.load(tmp_path).values()] == [(1,), (2,)]


def test_paths_are_folders_or_json_files(tmp_path):
    bank = ConceptBank([Concept("red", (1,), subspace=Subspace(directions(1, 3, 0), True))])
    bank.save(tmp_path / "mine.json")
    bank.save(str(tmp_path / "folder"))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".json", ".safetensors"]
    assert next(tmp_path.glob("mine-*.safetensors"))
    assert ConceptBank.load(tmp_path / "mine.json") == ConceptBank.load(str(tmp_path / "folder")) == bank
    assert ConceptBank.load(tmp_path / "folder" / "concepts.json") == bank


def test_a_diff_of_the_file_shows_which_field_has_changed(tmp_path):
    bank = ConceptBank([Concept(name, (1, 2), (0.5, 0.25), gamma=-1.0) for name in ("red", "blue")])
    bank.save(tmp_path / "old")
    bank.add(replace(bank["blue"], gamma=-2.0))
    bank.save(tmp_path / "new")
    old, new = ((tmp_path / name / "concepts.json").read_text().splitlines() for name in ("old", "new"))
    assert [(a, b) for a, b in zip(old, new, strict=True) if a != b] == [('   "gamma": -1.0', '   "gamma": -2.0')]


def test_a_thousand_concepts_are_quick(tmp_path):
    import time

    tail = tuple(i / 7 for i in range(32))
    bank = ConceptBank(Concept(str(i), tuple(range(i, i + 32)), tail, means=tail) for i in range(1000))
    began = time.process_time()
    bank.save(tmp_path)
    assert ConceptBank.load(tmp_path) == bank
    assert time.process_time() - began < 5  # 0.3 s where nothing else runs


def test_the_format_holds_all_that_the_records_hold(tmp_path):
    full = Concept(
        "red", (1, 2), (0.5, 0.25), -1.0, "gated", (1.0, 2.0), (0.5, 0.5), 0.5, True, Subspace(directions(1, 3, 0), False),
        Projection(directions(1, 3, 1), directions(1, 3, 1), torch.ones(3)), {"k": 2}, Effect("x", {}),
    )  # fmt: skip
    defaults = Concept("red", ())
    assert all(getattr(full, f.name) != getattr(defaults, f.name) for f in fields(Concept)[1:])
    ConceptBank([full]).save(tmp_path)
    written = json.loads((tmp_path / "concepts.json").read_text())["concepts"][0]
    assert written.keys() == {f.name for f in fields(Concept)}


# Whole or not at all. ------------------------------------------------------------------------------------------------


def bank_of(seed: int) -> ConceptBank:
    basis_rd = directions(2, D_IN, seed)
    return ConceptBank([Concept("red", (seed,), subspace=Subspace(basis_rd, True)), Concept(f"only in {seed}", (1,))])


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "an error"])
@pytest.mark.parametrize("step", range(5))
@pytest.mark.parametrize("name", ["replace", "fsync", "unlink"])
def test_a_save_that_is_cut_off_leaves_the_old_or_the_new(tmp_path, monkeypatch, name, step, killed):
    old, new = bank_of(1), bank_of(2)
    old.save(tmp_path)
    left = [step]

    def cut(owner, name):
        real = getattr(owner, name)

        def counted(*args, **kwargs):
            if killed and left[0] < 0:  # a process that is gone tidies nothing up
                return None
            left[0] -= 1
            if left[0] == -1:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    with monkeypatch.context():
        cut({"unlink": Path}.get(name, os), name)
        if killed and name != "unlink":
            real = Path.unlink
            monkeypatch.setattr(Path, "unlink", lambda *args, **kw: None if left[0] < 0 else real(*args, **kw))
        try:
            new.save(tmp_path)
            done = True
        except KeyboardInterrupt:
            done = False
    monkeypatch.undo()
    found = ConceptBank.load(tmp_path)
    assert found in ((new,) if done else (old, new))
    if not killed and name != "unlink":
        assert len(files(tmp_path)) == 2
    new.save(tmp_path)
    assert ConceptBank.load(tmp_path) == new


def test_a_bank_without_tensors_leaves_none_behind(tmp_path):
    bank_of(1).save(tmp_path)
    (tmp_path / "other-0123456789abcdef.safetensors").write_bytes(b"mine")
    ConceptBank([Concept("red", (1,))]).save(tmp_path)
    assert set(files(tmp_path)) == {"concepts.json", "other-0123456789abcdef.safetensors"}


def test_a_reader_that_meets_a_new_bank_halfway_gets_that_one(tmp_path, monkeypatch):
    import sauce_hooks.bank.format as module

    bank_of(1).save(tmp_path)
    real, calls = module._read_tensors, []

    def replaced_before(path, facts):
        if not calls:
            bank_of(2).save(tmp_path)
        calls.append(facts)
        return real(path, facts)

    monkeypatch.setattr(module, "_read_tensors", replaced_before)
    assert ConceptBank.load(tmp_path) == bank_of(2) and len(calls) == 2


def test_two_banks_are_never_read_as_one(tmp_path):
    for i in (1, 2):
        bank_of(i).save(tmp_path / str(i))
    tensors = [next((tmp_path / str(i)).glob("*.safetensors")) for i in (1, 2)]
    shutil.copy(tensors[1], tensors[0])
    with pytest.raises(SAEFileError, match="not what was written with this bank"):
        ConceptBank.load(tmp_path / "1")


def test_links_are_replaced_and_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    folder = tmp_path / "bank"
    bank_of(1).save(folder)
    for path in list(folder.iterdir()):
        path.unlink()
        path.symlink_to(outside)
    bank_of(1).save(folder)
    assert outside.read_text() == "mine"
    assert ConceptBank.load(folder) == bank_of(1) and not any(path.is_symlink() for path in folder.iterdir())


def test_what_is_read_may_be_links_as_in_the_hubs_cache(tmp_path):
    bank_of(1).save(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert ConceptBank.load(tmp_path / "snapshot") == bank_of(1)


# What cannot be. -----------------------------------------------------------------------------------------------------

BASIS = directions(2, 3, 0)
UNSAVABLE = {
    "a name with half of a surrogate pair": (Concept("a\ud800", (1,)), "surrogate"),
    "provenance with half of a surrogate pair": (Concept("a", (1,), provenance={"\udfff": 1}), "surrogate"),
    "a score that is NaN": (Concept("a", (1,), (math.nan,)), "scores: .*not finite"),
    "an infinite factor": (Concept("a", (1,), gamma=math.inf), "gamma: .*not finite"),
    "a mean that is infinite": (Concept("a", (1,), means=(-math.inf,)), "means: .*not finite"),
    "a feature beyond all counting": (Concept("a", (2**63,)), "features"),
    "provenance that is no JSON": (Concept("a", (1,), provenance={"x": torch.ones(1)}), "no Tensor"),
    "provenance with keys that are no text": (Concept("a", (1,), provenance={"x": {1: 2}}), "no text"),
    "a basis that is not orthonormal": (Concept("a", (1,), subspace=Subspace(2 * BASIS, True)), "orthonormal"),
    "a basis with NaN": (Concept("a", (1,), subspace=Subspace(BASIS * math.nan, True)), "not finite"),
    "a basis that repeats a row": (Concept("a", (1,), subspace=Subspace(BASIS[[0, 0]], True)), "orthonormal"),
    "more directions than dimensions": (Concept("a", (1,), subspace=Subspace(torch.eye(4)[:, :3], True)), "independent"),
    "a projection that is none": (Concept("a", (1,), projection=Projection(BASIS, -BASIS, torch.ones(3))), "R Lᵀ"),
}


@pytest.mark.parametrize(("concept", "why"), UNSAVABLE.values(), ids=UNSAVABLE)
def test_what_could_not_be_read_again_is_not_written(tmp_path, concept, why):
    bank_of(1).save(tmp_path)
    before = files(tmp_path)
    with pytest.raises(EditError, match=f"(?s)the concept 'a.*{why}"):
        ConceptBank([Concept("fine", (1,)), concept]).save(tmp_path)
    assert files(tmp_path) == before


def test_what_is_not_finite_in_provenance_is_null(tmp_path):
    ConceptBank([Concept("red", (1,), provenance={"SRA": math.nan, "odds": [math.inf, 1]})]).save(tmp_path)
    assert ConceptBank.load(tmp_path)["red"].provenance == {"SRA": None, "odds": [None, 1]}


def edit(change):
    """The same of a concept's entry, and of the whole."""

    def damage(folder: Path):
        path = folder / "concepts.json"
        data = json.loads(path.read_text())
        change(data["concepts"][0], data)
        path.write_text(json.dumps(data))

    return damage


def retensor(make):
    """Other tensors, named as they should be."""

    def damage(folder: Path):
        path = folder / "concepts.json"
        data = json.loads(path.read_text())
        raw = make(load_file(next(folder.glob("*.safetensors"))))
        sha256 = hashlib.sha256(raw).hexdigest()
        (folder / f"concepts-{sha256[:16]}.safetensors").write_bytes(raw)
        data["tensors"] = {"sha256": sha256, "bytes": len(raw)}
        path.write_text(json.dumps(data))

    return damage


def resized(**shape):
    header = json.dumps({"0": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 2**82], **shape}}).encode()
    return retensor(lambda _: struct.pack("<Q", len(header)) + header)


def rewrite(old: str, new: str):
    def damage(folder: Path):
        path = folder / "concepts.json"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return damage


def only(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def pipe(folder: Path):
    path = folder / "concepts.json"
    path.unlink()
    os.mkfifo(path)


def linked(to: str):
    def damage(folder: Path):
        only(folder).unlink()
        only_path = folder / ("concepts-" + json.loads((folder / "concepts.json").read_text())["tensors"]["sha256"][:16])
        only_path.with_name(only_path.name + ".safetensors").symlink_to(to)

    return damage


DAMAGES = {
    "a later format": edit(lambda c, d: d.update(format=3)),
    "a format that is no number": edit(lambda c, d: d.update(format="2")),
    "a format that is a truth": edit(lambda c, d: d.update(format=True)),
    "a format that is an object": edit(lambda c, d: d.update(format={})),
    "a field nobody knows": edit(lambda c, d: c.update(strength=3)),
    "something nobody knows": edit(lambda c, d: d.update(more=1)),
    "no features": edit(lambda c, d: c.pop("features")),
    "a feature twice": edit(lambda c, d: c.update(features=[1, 1])),
    "a negative feature": edit(lambda c, d: c.update(features=[-1])),
    "a feature and a half": edit(lambda c, d: c.update(features=[1.5])),
    "a true feature": edit(lambda c, d: c.update(features=[True])),
    "a huge feature": edit(lambda c, d: c.update(features=[10**30])),
    "features that are text": edit(lambda c, d: c.update(features="12")),
    "scores of other features": edit(lambda c, d: c.update(scores=[1.0, 2.0])),
    "a score that is null": edit(lambda c, d: c.update(scores=[None])),
    "a score that is NaN": edit(lambda c, d: c.update(scores=[math.nan])),
    "a score that is text": edit(lambda c, d: c.update(scores=["1"])),
    "a score that is too large": rewrite("0.5", "1e999"),
    "a whole score that is too large": rewrite("0.5", "1" + "0" * 400),
    "a number of 5,000 digits": rewrite("0.5", "1" * 5000),
    "provenance with NaN": edit(lambda c, d: c.update(provenance={"x": math.nan})),
    "provenance that is a list": edit(lambda c, d: c.update(provenance=[1])),
    "a name that is a number": edit(lambda c, d: c.update(name=3)),
    "a name that is half a pair": edit(lambda c, d: c.update(name="\ud800")),
    "a name twice": edit(lambda c, d: d["concepts"].append(d["concepts"][0])),
    "a key twice": rewrite('"name": "red"', '"name": "red", "name": "blue"'),
    "deep provenance": rewrite('"provenance": {', '"provenance": {"x": ' + "[" * 100_000 + "]" * 100_000 + ", "),
    "concepts that are an object": edit(lambda c, d: d.update(concepts={})),
    "concepts that are numbers": edit(lambda c, d: d.update(concepts=[1])),
    "no concepts": edit(lambda c, d: d.pop("concepts")),
    "no word on tensors": edit(lambda c, d: d.pop("tensors")),
    "a keep_norm that is a number": edit(lambda c, d: c.update(keep_norm=1)),
    "an effect of nothing": edit(lambda c, d: c.update(effect={})),
    "a rate without its interval": edit(lambda c, d: c["effect"]["figures"]["UA_d"].pop("low")),
    "a rate of −1 cases": edit(lambda c, d: c["effect"]["figures"]["UA_d"].update(n=-1)),
    "a tensor there is none of": edit(lambda c, d: c["subspace"].update(basis_rd=1)),
    "a tensor before the first": edit(lambda c, d: c["subspace"].update(basis_rd=-1)),
    "a tensor that is a path": edit(lambda c, d: c["subspace"].update(basis_rd="../0")),
    "tensors that are nowhere": lambda folder: only(folder).unlink(),
    "tensors of another length": lambda folder: only(folder).write_bytes(only(folder).read_bytes() + b"\0"),
    "tensors with another bit": lambda folder: only(folder).write_bytes(only(folder).read_bytes()[:-1] + b"\1"),
    "a hash that leads out": edit(lambda c, d: d["tensors"].update(sha256="../" * 21 + "x")),
    "a hash that is a number": edit(lambda c, d: d["tensors"].update(sha256=1)),
    "a length that is not said": edit(lambda c, d: d["tensors"].pop("bytes")),
    "tensors that are noise": retensor(lambda _: b"noise"),
    "tensors larger than all memory": resized(),
    "tensors that overflow": resized(shape=[2**63, 2], data_offsets=[0, 0]),
    "tensors by name": retensor(lambda t: safetensors_bytes({"red": t["0"]})),
    "tensors with a gap": retensor(lambda t: safetensors_bytes({"0": t["0"], "2": t["0"].clone()})),
    "whole numbers": retensor(lambda t: safetensors_bytes({"0": t["0"].long()})),
    "a basis of one dimension": retensor(lambda t: safetensors_bytes({"0": t["0"][0].clone()})),
    "a basis with infinity": retensor(lambda t: safetensors_bytes({"0": t["0"] * math.inf})),
    "a basis that is skew": retensor(lambda t: safetensors_bytes({"0": t["0"] + 0.1})),
    "a basis of more rows than fit": retensor(lambda t: safetensors_bytes({"0": torch.eye(D_IN + 1)[:, :D_IN].clone()})),
    "the JSON is a pipe": pipe,
    "the tensors are a device without end": linked("/dev/zero"),
    "the tensors are somebody's secrets": linked("/etc/passwd"),
    "the tensors are the folder": linked("."),
    "not Unicode": lambda folder: (folder / "concepts.json").write_bytes(b'{"format": "\xff"}'),
    "no JSON at all": lambda folder: (folder / "concepts.json").unlink(),
    "the JSON is a folder": lambda folder: ((folder / "concepts.json").unlink(), (folder / "concepts.json").mkdir()),
}


@pytest.fixture
def victim(tmp_path):
    rate = Rate(0.9, 10, 0.6, 1.0)
    basis, effect = Subspace(directions(2, D_IN, 0), True), Effect("x", {"UA_d": rate})
    concept = Concept("red", (1,), (0.5,), subspace=basis, provenance={"k": 1}, effect=effect)
    ConceptBank([concept]).save(tmp_path / "bank")
    return tmp_path / "bank"


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_bank_is_an_error_that_names_the_file(victim, damage):
    assert len(ConceptBank.load(victim)) == 1
    damage(victim)
    with pytest.raises(SAEFileError, match=r"concepts\.json"):
        ConceptBank.load(victim)


@given(data=st.data())
def test_a_file_cut_short_is_an_error(victim, tmp_path_factory, data):
    copy = tmp_path_factory.mktemp("cut") / "bank"
    shutil.copytree(victim, copy)
    path = data.draw(st.sampled_from(sorted(copy.iterdir())))
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole.rstrip()) - 1))])
    with pytest.raises(SAEFileError):
        ConceptBank.load(copy)


def test_an_edit_that_nobody_knows_yet_is_read(victim):
    edit(lambda c, d: c.update(edit="dream"))(victim)
    assert ConceptBank.load(victim)["red"].edit == "dream"


def test_a_bank_of_format_1_is_read(tmp_path):
    old = {"name": "red", "features": [3, 1], "scores": [0.5, 0.25], "gamma": -1.0, "provenance": {"k": 2}}
    (tmp_path / "concepts.json").write_text(json.dumps({"format": 1, "concepts": [old | {"edit": None, "means": []}]}))
    found = ConceptBank.load(tmp_path)
    assert found == ConceptBank([Concept("red", (3, 1), (0.5, 0.25), -1.0)]) and found.sae is None
    assert found["red"].provenance == {"k": 2}
    found.save(tmp_path)
    assert json.loads((tmp_path / "concepts.json").read_text())["format"] == 2 and ConceptBank.load(tmp_path) == found


def test_what_the_docs_show_is_a_bank(tmp_path):
    page = Path(__file__).parents[1] / "docs" / "bank.md"
    if not page.exists():
        pytest.skip("the docs are not here")
    example = re.search(r"## Example.*?```json\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[1]
    (tmp_path / "concepts.json").write_text(example)
    basis_rd = torch.tensor([[0.6, 0.8]])
    raw = safetensors_bytes({"0": basis_rd})
    (tmp_path / f"concepts-{hashlib.sha256(raw).hexdigest()[:16]}.safetensors").write_bytes(raw)
    bank = ConceptBank.load(tmp_path)
    assert torch.equal(bank["tiger"].subspace.basis_rd, basis_rd) and bank.sae.d_sae == 3
    bank.save(tmp_path / "again")
    assert (tmp_path / "again" / "concepts.json").read_text() == example
    documented = set(re.findall(r"^\| `(\w+)` \|", page.read_text().split("### A concept")[1].split("###")[0], re.MULTILINE))
    assert documented == {f.name for f in fields(Concept)}


# A mapping. ----------------------------------------------------------------------------------------------------------


@given(one=banks, other=banks, third=banks)
def test_merging_is_associative_and_idempotent_and_the_right_bank_wins(one, other, third):
    assert dict(one | other) == {**one, **other} and list(one | other) == list({**one, **other})
    assert everything((one | other) | third) == everything(one | (other | third))
    assert everything(one | one) == everything(one)
    assert everything(one | ConceptBank()) == everything(one) == everything(ConceptBank() | one)


@given(bank=banks)
def test_of_a_bank_nothing_differs_from_itself(bank):
    assert not bank.diff(bank) and bank.diff(bank) == BankDiff() and str(bank.diff(bank)) == "no difference"


@given(one=banks, other=banks)
def test_what_a_diff_lists_makes_the_one_bank_the_other(one, other):
    difference = one.diff(other)
    made = ConceptBank(one.values())
    for name in difference.removed:
        del made[name]
    for name in (*difference.added, *difference.changed):
        made.add(other[name])
    assert made == other and not made.diff(other)
    back = other.diff(one)
    assert (set(back.added), set(back.removed)) == (set(difference.removed), set(difference.added))
    assert {n: c.fields for n, c in back.changed.items()} == {n: c.fields for n, c in difference.changed.items()}


def test_a_diff_says_which_fields_how_many_features_and_how_far():
    old = ConceptBank([Concept("red", (1, 2, 3), gamma=-0.5), Concept("gone", (1,)), Concept("b", (1, 2))])
    new = ConceptBank(
        [Concept("red", (2, 9), gamma=-1.5, edit="clamp"), Concept("new\n", (1,)), Concept("b", (2, 1), gamma=0.0)]
    )
    difference = old.diff(new)
    assert (difference.added, difference.removed) == (("new\n",), ("gone",))
    red = difference.changed["red"]
    assert (red.fields, red.features_added, red.features_removed, red.gamma) == (
        ("features", "gamma", "edit"), (9,), (1, 3), (-0.5, -1.5)
    )  # fmt: skip
    assert str(difference).splitlines() == [
        "+ 'new\\n'",
        "− 'gone'",
        "~ 'red': features +1 −2, γ -0.5 → -1.5 (-1), edit",
        "~ 'b': features +0 −0 in another order, γ none → 0",
    ]


def test_provenance_and_effect_count_in_a_diff():
    red, nan = Concept("red", (1,)), Rate(math.nan, 0, math.nan, math.nan)
    measured = [replace(red, effect=Effect("x", {"SRA": replace(nan, value=float("nan"))})) for _ in range(2)]
    assert not ConceptBank(measured[:1]).diff(ConceptBank(measured[1:]))
    assert ConceptBank([red]).diff(ConceptBank(measured[:1])).changed["red"].fields == ("effect",)
    moved = ConceptBank([replace(red, provenance={"k": 1})])
    assert ConceptBank([red]).diff(moved).changed["red"].fields == ("provenance",)


def test_a_concept_can_be_removed():
    bank = ConceptBank([Concept("red", (1,)), Concept("blue", (2,))])
    del bank["red"]
    assert list(bank) == ["blue"]
    with pytest.raises(UnknownConceptError, match="blue"):
        del bank["blu"]


# Whose features these are. -------------------------------------------------------------------------------------------


@pytest.fixture
def other(sae):
    """Another SAE of the same place and size."""
    return VisionSAE(make_sae(seed=1), sae.hook_point, TokenPolicy())


def test_a_saved_bank_knows_its_sae(sae, tmp_path):
    sae.save(tmp_path / "sae")
    loaded = VisionSAE.load(tmp_path / "sae")
    assert loaded.concepts == sae.concepts
    assert loaded.concepts.sae == sae.record() == ConceptBank.load(tmp_path / "sae").sae
    loaded.save(tmp_path / "sae")
    sae.concepts = loaded.concepts | ConceptBank([Concept("by hand", (1,))])
    assert sae.concepts.sae == sae.record()


def test_a_bank_of_another_sae_is_never_used_in_silence(sae, other, tmp_path):
    sae.save(tmp_path / "sae")
    other.concepts.add(Concept("green", (8,)))
    other.save(tmp_path / "other")
    theirs = ConceptBank.load(tmp_path / "other")
    mine = ConceptBank.load(tmp_path / "sae")
    for use in (
        lambda: mine | theirs,
        lambda: theirs | mine,
        lambda: setattr(sae, "concepts", theirs),
        lambda: VisionSAE(sae.sae, sae.hook_point, concepts=theirs),
        lambda: mine.add(Concept("x", (1,)), sae=other.record()),
        lambda: theirs.of(sae.record()),
    ):
        with pytest.raises(SAEMismatchError, match=r"another SAE: of 64 weights that were compared, \d+ differ"):
            use()
    assert list(mine) == ["red", "tiger", "blue"]
    shutil.copy(tmp_path / "other" / "concepts.json", tmp_path / "sae")
    with pytest.raises(SAEMismatchError, match="another SAE"):
        VisionSAE.load(tmp_path / "sae")
    sae.concepts = ConceptBank(theirs.values())  # said in so many words
    sae.save(tmp_path / "sae")
    assert VisionSAE.load(tmp_path / "sae").concepts == theirs


def test_saving_concepts_that_are_anothers_by_now_is_an_error_that_leaves_the_old(sae, other, tmp_path):
    sae.save(tmp_path / "sae")
    loaded = VisionSAE.load(tmp_path / "sae")
    loaded.sae = other.sae
    before = files(tmp_path / "sae")
    with pytest.raises(SAEMismatchError):
        loaded.save(tmp_path / "sae")
    assert files(tmp_path / "sae") == before


def test_an_empty_bank_is_any_saes(sae, other, tmp_path):
    other.save(tmp_path / "other")
    empty = ConceptBank.load(tmp_path / "other")
    assert len(empty) == 0 and (sae.concepts | empty) == sae.concepts
    sae.concepts = empty
    sae.save(tmp_path / "sae")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_sae_is_known_again_in_another_precision_and_with_its_norms_folded(sae, dtype):
    bare = make_sae("standard")
    then = record_sae(bare, sae.hook_point, None)
    bare.fold_W_dec_norm()
    assert then.difference(record_sae(bare, sae.hook_point, None)) is None
    bare.to(dtype)
    assert then.difference(record_sae(bare, sae.hook_point, None)) is None


@given(seed=st.integers(1, 10**6))
@settings(max_examples=10)
def test_another_sae_is_another(sae, seed):
    one, two = (record_sae(make_sae(seed=s), sae.hook_point, None) for s in (0, seed))
    assert "differ" in one.difference(two) and "differ" in two.difference(one)
    assert one.difference(one) is None


def test_features_that_the_sae_does_not_have_are_an_error(sae, tmp_path):
    beyond = Concept("beyond", (D_SAE,))
    sae.concepts.add(beyond)
    with pytest.raises(EditError, match=f"'beyond': feature {D_SAE} is none of the SAE's {D_SAE}"):
        sae.save(tmp_path / "sae")
    del sae.concepts["beyond"]
    sae.save(tmp_path / "sae")
    ConceptBank([beyond]).save(tmp_path / "sae")  # which says of no SAE that it is its
    with pytest.raises(SAEFileError, match="beyond"):
        VisionSAE.load(tmp_path / "sae")
    ConceptBank([Concept("wide", (1,), subspace=Subspace(directions(1, D_IN + 1, 0), True))]).save(tmp_path / "sae")
    with pytest.raises(SAEFileError, match=f"{D_IN + 1} wide"):
        VisionSAE.load(tmp_path / "sae")
    (tmp_path / "one").mkdir()
    sae.save(tmp_path / "fine")
    data = json.loads((tmp_path / "fine" / "concepts.json").read_text())
    data["concepts"][0]["features"] = [D_SAE]
    (tmp_path / "one" / "concepts.json").write_text(json.dumps(data))
    with pytest.raises(SAEFileError, match=f"feature {D_SAE}"):
        ConceptBank.load(tmp_path / "one")


def test_tensors_are_saved_with_the_sae_and_old_ones_go(sae, tmp_path):
    for seed in (1, 2):
        sae.concepts.add(Concept("red", (1,), subspace=Subspace(directions(2, D_IN, seed), True)))
        sae.save(tmp_path / "sae")
        assert VisionSAE.load(tmp_path / "sae").concepts == sae.concepts
        assert len(list((tmp_path / "sae").glob("concepts-*"))) == 1


# Provenance. ---------------------------------------------------------------------------------------------------------


def test_provenance_says_which_sae_which_tower_when_and_with_what(model, sae, tmp_path):
    facts = provenance_of(sae)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", facts.pop("date"))
    assert facts.keys() == {"sae", "hook_point", "library"}  # nobody recorded the tower
    assert facts["hook_point"] == sae.hook_point.path and facts["library"].startswith("sauce_hooks ")
    known = VisionSAE.wrap(sae.sae, sae.hook_point, model=model)
    assert re.fullmatch("[0-9a-f]{16}", provenance_of(known)["tower"])
    known.save(tmp_path / "sae")
    again, now = provenance_of(VisionSAE.load(tmp_path / "sae")), provenance_of(known)
    assert {**again, "date": ""} == {**now, "date": ""}
    assert provenance_of(VisionSAE(make_sae(seed=1), sae.hook_point))["sae"] != facts["sae"]
    sae.concepts.add(Concept("red", (1,), provenance=now))
    sae.save(tmp_path / "sae")
    assert VisionSAE.load(tmp_path / "sae").concepts["red"].provenance == now


@given(counts=st.lists(st.integers(0, 9), min_size=2, max_size=9), n=st.integers(1, 9))
def test_a_digest_is_of_the_counts_however_they_were_added_up(counts, n):
    whole = torch.tensor(counts, dtype=torch.float64)
    parts = whole - whole.flip(0).int().double() + whole.flip(0)
    assert digest(parts, n) == digest(whole.int(), n)
    assert digest(whole, n + 1) != digest(whole, n) != digest(whole + 1, n)
    assert digest(whole.reshape(1, -1)) != digest(whole)
    with pytest.raises(ValueError, match="whole"):
        digest(whole + 0.5)


# The hub. ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that is a folder: a repository is a folder in it."""
    root = tmp_path / "hub"

    class Api:
        def create_repo(self, repo_id, *, private, exist_ok):
            (root / repo_id).mkdir(parents=True, exist_ok=True)
            return f"https://hub.test/{repo_id}"

        def file_exists(self, repo_id, filename):
            return (root / repo_id / filename).is_file()

        def hf_hub_download(self, repo_id, filename):
            return str(root / repo_id / filename)

        def upload_folder(self, *, repo_id, folder_path, delete_patterns):
            new = files(Path(folder_path))
            for pattern in delete_patterns:
                for path in (root / repo_id).glob(pattern):
                    path.unlink()
            for name, content in new.items():
                (root / repo_id / name).write_bytes(content)

    def snapshot_download(repo_id, allow_patterns):
        if not (root / repo_id).is_dir():
            raise OSError(f"there is no {repo_id}")
        target = tmp_path / "cache" / repo_id
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for pattern in allow_patterns:
            for path in (root / repo_id).glob(pattern):
                shutil.copy(path, target)
        return str(target)

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return root


def test_an_sae_goes_up_with_its_bank_and_comes_down_again(hub, sae):
    for seed in (1, 2):
        sae.concepts.add(Concept("red", (1,), subspace=Subspace(directions(2, D_IN, seed), True)))
        assert sae.push_to_hub("me/sae", license="mit") == "https://hub.test/me/sae"
        assert VisionSAE.load("me/sae").concepts == sae.concepts
        assert len(list((hub / "me/sae").glob("concepts-*"))) == 1
    assert "license: mit" in (hub / "me/sae/README.md").read_text()
    bank = ConceptBank.load("me/sae")  # without the weights
    assert bank == sae.concepts and bank.sae == sae.record()
    assert set(files(hub.parent / "cache/me/sae")) == {p.name for p in (hub / "me/sae").glob("concepts*")}


def test_others_can_publish_concepts_for_somebodys_sae(hub, sae, other):
    sae.push_to_hub("them/sae")
    theirs = VisionSAE.load("them/sae")
    theirs.concepts.add(Concept("mine", (9,)))
    theirs.concepts.push_to_hub("me/bank", sae="them/sae", license="cc-by-4.0")
    assert set(files(hub / "me/bank")) == {"concepts.json", "README.md"}
    card = (hub / "me/bank/README.md").read_text()
    assert "VisionSAE.load('them/sae')" in card and "ConceptBank.load('me/bank')" in card and "license: cc-by-4.0" in card
    sae = VisionSAE.load("them/sae")
    sae.concepts |= ConceptBank.load("me/bank")
    assert sae.concepts["mine"].features == (9,)
    with pytest.raises(SAEMismatchError):
        other.concepts = ConceptBank.load("me/bank")


def test_a_bank_of_another_sae_is_not_pushed_beside_an_sae(hub, sae, other, tmp_path):
    sae.push_to_hub("them/sae")
    before = files(hub / "them/sae")
    other.concepts.add(Concept("green", (8,)))
    other.save(tmp_path / "other")
    with pytest.raises(SAEMismatchError):
        ConceptBank.load(tmp_path / "other").push_to_hub("them/sae")
    assert files(hub / "them/sae") == before


def test_a_card_that_somebody_wrote_stays_and_an_saes_is_not_replaced_by_a_banks(hub, sae):
    sae.push_to_hub("me/sae")
    card = (hub / "me/sae/README.md").read_text()
    sae.concepts.add(Concept("new", (9,)))
    sae.concepts.push_to_hub("me/sae")
    assert (hub / "me/sae/README.md").read_text() == card and "new" in ConceptBank.load("me/sae")
    sae.push_to_hub("me/sae")
    assert "| new | 1 |" in (hub / "me/sae/README.md").read_text()
    (hub / "me/sae/README.md").write_text("mine")
    sae.push_to_hub("me/sae")
    assert (hub / "me/sae/README.md").read_text() == "mine"


@pytest.mark.parametrize("source", ["nobody/nothing", "no such thing at all", ""])
def test_what_is_neither_here_nor_on_the_hub_is_an_error(hub, source):
    with pytest.raises(SAEFileError):
        ConceptBank.load(source)


# Cards. --------------------------------------------------------------------------------------------------------------

markdown = MarkdownIt("commonmark", {"html": True}).enable("table")


def cells(text: str) -> list[list[str]]:
    """The concepts' rows as a reader of the rendered page sees them; nothing in them but text."""
    tokens = markdown.parse(text)
    rows: list[list[str]] = []
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        if token.type == "inline" and rows:
            assert {child.type for child in token.children} <= {"text", "text_special", "em_open", "em_close"}
            rows[-1].append("".join(child.content for child in token.children))
    assert not any(token.type == "html_block" for token in tokens if "sauce_hooks: card" not in token.content)
    return rows[1:]


@given(names=st.lists(st.text(max_size=20) | st.sampled_from(HOSTILE), min_size=1, max_size=4, unique=True))
@settings(max_examples=100)
def test_names_stand_on_a_card_as_they_are_and_do_nothing(names):
    found = cells(concepts_section([Concept(name, (1, 2)) for name in names]))
    assert len(found) == len(names)
    for name, row in zip(names, found, strict=True):
        assert row[1] == "2"
        if name.isprintable() and 0 < len(name.strip()) <= LONGEST:
            assert row[0] == name.strip()
        assert "\u202e" not in row[0] and len(row[0]) <= LONGEST


@given(name=st.text(max_size=20) | st.sampled_from(HOSTILE))
def test_the_code_on_a_card_runs_with_any_name(name):
    text = bank_card([Concept(name, (1,))], None, "me/bank", sae_id="them/sae", license=None)
    blocks = [token for token in markdown.parse(text) if token.type == "fence"]
    assert len(blocks) == 1 and blocks[0].info == "python"
    said = []
    scope = {
        "model": SimpleNamespace(generate=lambda **_: None),
        "inputs": {},
        "sauce_hooks": SimpleNamespace(
            VisionSAE=SimpleNamespace(load=lambda source: SimpleNamespace(concepts=set())),
            ConceptBank=SimpleNamespace(load=lambda source: set()),
            ConceptEraser=lambda model, sae, names: (said.append(names), __import__("contextlib").nullcontext())[1],
        ),
    }
    exec(blocks[0].content, scope)
    assert said == [[name]]


def test_a_card_holds_the_facts_and_leaves_out_what_is_not_known(model, sae):
    bare = sae_card(sae, "me/sae")
    for absent in ("license", "Measured", "image size", "explained", "γ |  |", "measured effect", "None", "nan"):
        assert absent not in bare.replace("None yet", "")
    sae = VisionSAE.wrap(sae.sae, sae.hook_point, model=model)
    sae.stats = FeatureStats(torch.tensor([0.0] * 12 + [0.5] * (D_SAE - 12)), torch.rand(D_SAE), 0.75, 3.5, 1000)
    effect = Effect("test scenes", {"UA_d": Rate(0.97, 50, 0.9, 0.99), "SRA": Rate(math.nan, 0, math.nan, math.nan)})
    effect = replace(effect, original={"UA_d": Rate(0.02, 50, 0.0, 0.1)})
    sae.concepts.add(Concept("tiger", (3, 4, 5), gamma=-1.0, edit="clamp", effect=effect))
    card = sae_card(sae, "me/sae", license="mit")
    for fact in (
        "license: mit", "| architecture | jumprelu |", f"| {D_IN} |", f"| features (d_sae) | {D_SAE} |",
        sae.hook_point.path, "32 × 32", "| explained variance | 0.7500 |", "3.50", "25.00%", "VisionSAE.load('me/sae')",
        "ConceptEraser(model, sae, ['tiger'])", "not deleted, only not accessible through this model while the eraser is on",
    ):  # fmt: skip
        assert fact in card
    assert cells(card.split("## Concepts")[1].split("##")[0]) == [
        ["tiger", "3", "-1", "clamp", "UA_d 0.970 (0.900 to 0.990), n = 50 [before: 0.020 (0.000 to 0.100), n = 50]",
         "test scenes"]
    ]  # fmt: skip


def test_long_texts_are_cut():
    assert len(escaped("n" * 10_000)) <= LONGEST + 1


def test_the_bundled_bank_is_read():
    path = Path(sauce_hooks.__file__).parent / "scenes" / "assets" / "sae"
    bank = ConceptBank.load(path)
    assert len(bank) >= 30 and all(c.features for c in bank.values())
    assert _CONCEPT.write(bank["red"], [])["name"] == "red"
