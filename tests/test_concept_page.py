"""The page of a concept: what it shows is what was measured, one file is all there is, and no name can break it."""

import base64
import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from sauce_hooks import Concept, ConceptBank, ConceptEraser, VisionSAE, cli, scenes
from sauce_hooks.activations import read_tokens
from sauce_hooks.bank import CurvePoint, Effect, Rate, Subspace
from sauce_hooks.errors import EditError, ImagesError, UnreadableImageWarning
from sauce_hooks.evaluation.metrics import auroc
from sauce_hooks.hookpoint import TokenLayout
from sauce_hooks.report.concept import render_concept, write_concept
from sauce_hooks.report.concept_data import (
    Evidence,
    Seen,
    SeenSet,
    as_seen,
    look,
    patch_grid,
    siblings_of,
    written_direction,
)
from sauce_hooks.report.pictures import CHANGE_RGB, tint
from sauce_hooks.report.plots import mirror, roc, tradeoff
from sauce_hooks.sae import FeatureStats, Gallery
from tiny import D_SAE, PATCH, SIDE, make_vision_sae, pictures

HOSTILE = ("</style></script><script>alert(1)</script>", "<!--<script>", "tigre 虎 \U0001f405", "\ud800", "'\"&\\\n\u2028")
runner = CliRunner()


@pytest.fixture
def sae(model):
    """With statistics; the fixture's random features fire all over the place."""
    sae = make_vision_sae(model)
    share = torch.linspace(0, 0.5, D_SAE)
    sae.stats = FeatureStats(share, 2 * share, 0.9, 7.5, 1234)
    return sae


@pytest.fixture
def evidence(model, sae, processor):
    sets = (pictures(5, 1), pictures(7, 2))
    return look(model, sae, sae.concepts["tiger"], *sets, {"blue": pictures(3, 3)}, processor=processor)


class Parsed(HTMLParser):
    """What a browser would make of a page: its tags with their attributes, and its text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data + " "

    def of(self, tag, **attrs):
        return [found for name, found in self.tags if name == tag and attrs.items() <= found.items()]


def said(html):
    return " ".join(Parsed(html).text.split())


def effect(n=3, name="UA_d"):
    rates = {name: Rate(0.975, 40, 0.9, 1.0), "SRA": Rate(0.8125, 40, 0.7, 0.9), "UA_g": Rate(0.95, 40, 0.8, 1.0)}
    curve = tuple(
        CurvePoint(k, -0.5, "scale", {m: Rate(0.5 + k / 10, 40, 0.4, 1.0) for m in ("UA_d", "UA_g", "SRA")}, chosen=k == 2)
        for k in range(1, n + 1)
    )
    return Effect("40 scenes", rates, {"SRA": Rate(0.9375, 40, 0.8, 1.0)}, curve)


# What is measured. ----------------------------------------------------------------------------------------------------


def test_what_is_seen_is_what_the_sae_and_the_eraser_do(model, sae, processor, evidence):
    concept = sae.concepts["tiger"]
    acts_btd = torch.cat(list(read_tokens(model, pictures(5, 1), sae.hook_point, tokens="patches", processor=processor)))
    z_btk = sae.encode(acts_btd)[..., list(concept.features)]
    change_btd = ((ConceptEraser(model, sae, ["tiger"]).edit.gammas[3] - 1) * z_btk) @ sae.sae.W_dec[list(concept.features)]
    assert [len(s.images) for s in (evidence.positives, evidence.negatives, evidence.siblings["blue"])] == [5, 7, 3]
    for i, seen in enumerate(evidence.positives.images):
        torch.testing.assert_close(seen.z_ts, z_btk[i])
        torch.testing.assert_close(seen.mean_k, z_btk[i].mean(0))
        expected_t = change_btd[i].norm(dim=-1) / acts_btd[i].norm(dim=-1)
        torch.testing.assert_close(seen.change_t, expected_t.detach(), atol=1e-5, rtol=1e-4)
        assert seen.summed == pytest.approx(float(z_btk[i].sum(-1).mean()))
        assert seen.grid == (SIDE // PATCH, SIDE // PATCH)


def test_the_picture_is_what_the_model_is_given(processor):
    wide = Image.new("RGB", (2 * SIDE, SIDE), "blue")  # its middle is cut out for the model, and patches lie in that
    wide.paste("red", (SIDE // 2, 0, 3 * SIDE // 2, SIDE))
    [picture] = as_seen(processor.image_processor([wide], return_tensors="pt")["pixel_values"], processor)
    assert picture.size == (SIDE, SIDE)
    assert np.abs(np.asarray(picture).astype(int) - (255, 0, 0)).max() <= 1
    assert as_seen(torch.zeros(1, 2, 3, SIDE, SIDE), processor) is None


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), patch=st.integers(1, 20), missing=st.integers(0, 5))
def test_a_grid_is_the_one_that_square_patches_make_or_none(rows, columns, patch, missing):
    width, height = columns * patch, rows * patch
    assert patch_grid(TokenLayout(), rows * columns, width, height) == (rows, columns)
    found = patch_grid(TokenLayout(), rows * columns + missing, width, height)
    assert found is None or found[0] * found[1] == rows * columns + missing
    for unknown in (TokenLayout(fixed=False), TokenLayout(tiles_in_row=(5, 8))):
        assert patch_grid(unknown, rows * columns, width, height) is None


@pytest.mark.parametrize("n", [2, 3, 5, 6, 8, 12, 15, 17])
def test_a_square_picture_has_no_other_grid_than_a_square(n):
    assert patch_grid(TokenLayout(), n, 224, 224) is None


def test_broken_images_are_named_on_the_page(model, sae, processor, tmp_path):
    for i, picture in enumerate(pictures(3)):
        picture.save(tmp_path / f"{i}.png")
    (tmp_path / "<b>cut.png").write_bytes(b"\x89PNG cut")
    with pytest.warns(UnreadableImageWarning):
        found = look(model, sae, sae.concepts["tiger"], tmp_path, pictures(2), processor=processor)
    assert (len(found.positives.images), len(found.positives.broken)) == (3, 1)
    html = render_concept(sae, sae.concepts["tiger"], found)
    assert "1 images with it could not be read" in said(html)
    assert "&lt;b&gt;cut.png" in html
    with pytest.raises(ImagesError, match="none of the 1"):
        look(model, sae, sae.concepts["tiger"], [tmp_path / "<b>cut.png"], pictures(2), processor=processor)


def test_batches_of_inputs_are_refused_for_they_hold_no_pictures(model, sae, processor):
    with pytest.raises(ImagesError, match="pictures"):
        look(model, sae, sae.concepts["tiger"], [{"pixel_values": torch.zeros(1, 3, SIDE, SIDE)}], [], processor=processor)


def test_more_images_than_the_page_needs_are_not_looked_at(model, sae, processor, monkeypatch):
    monkeypatch.setattr("sauce_hooks.report.concept_data.MOST_IMAGES", 4)
    found = look(model, sae, sae.concepts["tiger"], pictures(5), pictures(4), processor=processor, batch_size=3)
    assert [(len(s.images), s.cut) for s in (found.positives, found.negatives)] == [(4, True), (4, False)]
    assert "only the first" in said(render_concept(sae, sae.concepts["tiger"], found))


# Directions and siblings. ---------------------------------------------------------------------------------------------


def test_a_direction_is_what_the_edit_adds_where_every_feature_is_at_its_mean(model, sae):
    concept = Concept("c", (4, 9), gamma=-1.0, means=(2.0, 0.5))
    expected_d = -4.0 * sae.sae.W_dec[4] - 1.0 * sae.sae.W_dec[9]
    torch.testing.assert_close(written_direction(sae, concept).float(), expected_d.detach())
    basis_rd = torch.linalg.qr(torch.randn(sae.d_in, 5)).Q.T.contiguous()
    inside, outside = (written_direction(sae, replace(concept, subspace=Subspace(basis_rd, i))) for i in (True, False))
    torch.testing.assert_close(inside + outside, written_direction(sae, concept))
    assert float((outside @ basis_rd.double().T).abs().max()) < 1e-5
    assert written_direction(sae, Concept("none", ())) is None
    assert written_direction(sae, replace(concept, gamma=1.0)) is None


def test_siblings_share_features_first_then_point_the_same_way(sae):
    sae.stats = None
    twin, far = Concept("twin", (5, 4, 3)), Concept("far", (20,))
    sae.concepts.add(twin)
    sae.concepts.add(far)
    found = siblings_of(sae, sae.concepts["tiger"])
    assert [(s.name, s.shared) for s in found[:2]] == [("twin", (3, 4, 5)), ("red", (3,))]
    assert found[0].cosine == pytest.approx(1.0)
    assert {s.name for s in found[2:]} == {"blue", "far"}
    assert abs(found[2].cosine) >= abs(found[3].cosine)


# Plots. ---------------------------------------------------------------------------------------------------------------

values = st.lists(st.floats(0, 100, width=32) | st.just(0.0), min_size=1, max_size=40).map(np.array)


@given(values, values)
def test_a_mirrored_histogram_counts_every_image_once(positive, negative):
    found = mirror(positive, negative)
    assert sum(bar.positive for bar in found.bars) + found.zero_positive == pytest.approx(1)
    assert sum(bar.negative for bar in found.bars) + found.zero_negative == pytest.approx(1)


@given(values, values)
def test_the_area_under_the_drawn_curve_is_the_auroc_that_is_told(positive, negative):
    found = roc("", "", positive, negative)
    x, y = ([getattr(p, name) for p in found.points] for name in ("negative", "positive"))
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert (
        np.trapezoid(y, x)
        == pytest.approx(found.area.value)
        == pytest.approx(auroc(positive.tolist(), negative.tolist()).value)
    )
    for p in found.marked:
        assert p.positive == pytest.approx((positive >= p.threshold).mean())
        assert p.negative == pytest.approx((negative >= p.threshold).mean())


def test_every_setting_that_tells_both_is_on_the_curve():
    curve = [
        CurvePoint(
            k, gamma, "scale", {"UA_d": Rate(0.9, 9, 0, 1), "UA_g": Rate(0.1 * k, 9, 0, 1), "SRA": Rate(0.5, 9, 0, 1)}
        )
        for k in (1, 2)
        for gamma in (0.0, -1.0)
    ]
    nothing = Rate(math.nan, 0, math.nan, math.nan)
    found = tradeoff("SRA", [*curve, CurvePoint(3, 0.0, "scale", {"UA_d": nothing, "SRA": nothing})], {})
    assert sorted(p.forgotten for p in found.points) == pytest.approx([10, 10, 20, 20])  # the smaller of the two forms
    assert [len(line) for line in found.lines] == [2, 2]
    assert tradeoff("IRA", curve, {}) is None


@given(st.integers(1, 6), st.integers(1, 6))
def test_a_map_is_clear_exactly_where_nothing_fires(rows, columns):
    strength = np.random.default_rng(rows).random((rows, columns)) * (np.random.default_rng(1).random((rows, columns)) > 0.5)
    rgba = np.asarray(tint(strength, 1.0))
    assert ((rgba[..., 3] > 0) == (strength > 0)).all()
    assert (rgba[strength > 0][:, :3] == CHANGE_RGB).all()
    order = strength.ravel().argsort()
    assert (np.diff(rgba[..., 3].ravel()[order].astype(int)) >= 0).all()


# The page. ------------------------------------------------------------------------------------------------------------


def test_the_page_tells_what_is_known(sae, evidence):
    concept = replace(
        sae.concepts["tiger"], scores=(0.3, 0.2, 0.1), effect=effect(), provenance={"scorer": "sauce", "n": 0.25}
    )
    html = render_concept(sae, concept, evidence, sae_name="mine")
    text = said(html)
    for expected in ("97.5 [90.0, 100.0]", "93.8 [80.0, 100.0]", "81.2 [70.0, 90.0]", "40 scenes", "sauce", "score 0.3"):
        assert expected in text
    assert "5 images with it and 7 without" in text
    assert "Shared with red" in text
    share = float(sae.stats.frequency_f[3])
    assert f"fires on {100 * share:.1f}% of training rows" in text
    page = Parsed(html)
    assert len(page.of("circle", **{"class": "ring"})) == 1  # chosen, on the one panel: no IRA was measured
    assert "k = 2, γ = −0.5, scale: UA_d 70.0" in text
    assert "Not measured" not in text
    summed = auroc(*([seen.summed for seen in s.images] for s in (evidence.positives, evidence.negatives)))
    assert f"AUROC {summed.value:.3f}" in text
    assert "with it without it blue feature 3" in text


def test_the_maps_on_the_page_are_the_activations(sae, evidence):
    html = render_concept(sae, sae.concepts["tiger"], evidence)
    maps = [np.asarray(Image.open(io.BytesIO(base64.b64decode(img["src"].split(",")[1])))) for img in Parsed(html).of("img")]
    assert maps and all(m.shape == (SIDE // PATCH, SIDE // PATCH, 4) for m in maps)
    everything = [*evidence.positives.images, *evidence.negatives.images, *evidence.siblings["blue"].images]
    best = max(everything, key=lambda seen: float(seen.peak_s[0]))
    scale = float(best.peak_s[0])
    np.testing.assert_array_equal(maps[0], np.asarray(tint(best.z_ts[:, 0].reshape(4, 4).numpy(), scale)))


def test_top_images_come_strongest_first_and_say_whether_they_hold_it(sae):
    def seen(strength, color):
        return Seen(
            Image.new("RGB", (8, 8), color), None, torch.tensor([strength]), torch.tensor([[strength]]), torch.zeros(1)
        )

    found = Evidence(SeenSet((seen(1.0, "red"), seen(3.0, "blue"))), SeenSet((seen(2.0, "green"), seen(0.0, "black"))))
    html = render_concept(sae, Concept("c", (7,)), found)
    captions = re.findall(r'<figure class="pic( holds)?">.*?<figcaption>(.*?)</figcaption>', html, re.S)
    assert captions[:4] == [(" holds", "3"), ("", "2"), (" holds", "1"), ("", "2")]  # of all, then without it; none at 0
    assert "2 of 3 hold it" in said(html)
    assert "how the patches of this model lie over an image is not known" in said(html)
    assert not Parsed(html).of("img")


def named(sae, name):
    """A concept that is called so in whatever can hold a text, in a bank of others."""
    curve = replace(effect().curve[0], edit=name)
    measured = replace(effect(name=name), images=name, curve=(curve,))
    concept = Concept(name, (3, 4), provenance={name: name, "list": [name]}, edit=name, effect=measured)
    sae.concepts = ConceptBank([concept, *(Concept(f"{name} {i}", (i, 3)) for i in range(5, 9))])
    return concept


@pytest.mark.parametrize("name", HOSTILE)
def test_one_file_is_all_there_is_and_names_are_only_text(sae, evidence, tmp_path, name):
    concept, found = named(sae, name), replace(evidence, source=name, siblings={name: evidence.siblings["blue"]})
    page = write_concept(sae, concept, tmp_path / "deep" / "page.html", found, sae_name=name)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["page.html"]
    html = page.read_text(encoding="utf-8")
    plain = Parsed(render_concept(sae, named(sae, "plain"), replace(found, siblings={"plain": evidence.siblings["blue"]})))
    parsed = Parsed(html)
    assert [tag for tag, _ in parsed.tags] == [tag for tag, _ in plain.tags]
    assert not parsed.of("script") and "<!--" not in html
    assert not [a for _, attrs in parsed.tags for a in attrs if a.startswith("on") or a in ("href", "srcdoc")]
    assert not re.findall(r"""(?:src|href)=["']?(?!data:image/)[^"'>\s]+""", html)
    assert not re.findall(r"https?://|@import|url\((?!data:image/)", html)
    assert "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in html
    shown = name.encode("utf-8", "replace").decode()
    assert " ".join(shown.split()) in " ".join(parsed.text.split())


def test_a_page_is_under_five_megabytes_whatever_it_is_given(sae):
    rng = np.random.default_rng(0)

    def seen(i):
        noise = Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8))
        z = torch.rand(100 * 100, 12)
        return Seen(noise, (100, 100), z.mean(0), z, torch.rand(100 * 100))

    images = [SeenSet(tuple(map(seen, range(24)))), SeenSet(tuple(map(seen, range(24))))]
    sae.concepts = ConceptBank([Concept(f"{i} " + "x" * 10_000, tuple(range(12))) for i in range(200)])
    many = replace(effect(2_000), figures={str(i): Rate(0.5, 1, 0, 1) for i in range(1_000)})
    concept = Concept("y" * 100_000, tuple(range(12)), effect=many, provenance={str(i): "z" * 10**5 for i in range(100)})
    assert 10**6 < len(render_concept(sae, concept, Evidence(*images)).encode()) < 5 * 10**6


def test_without_images_the_page_shows_the_gallery_and_says_what_is_missing(sae):
    concept = sae.concepts["tiger"]
    bare = said(render_concept(sae, concept))
    assert "--positives" in bare and "sauce-hooks features" in bare and "Not measured" in bare
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    images, strengths = torch.zeros(D_SAE, 3, dtype=torch.int64), torch.ones(D_SAE, 3)
    images[:, 1], images[:, 2] = 1, 2
    foreign = {0: buffer.getvalue(), 1: b"<svg onload=alert(1)>"}
    sae.gallery = Gallery(images, strengths, torch.full((D_SAE,), 0.5), 0.25, "e", 500, foreign)
    page = Parsed(render_concept(sae, concept))
    assert len(page.of("figure")) == len(concept.features)  # of each feature, the one picture that is a small JPEG
    assert "500 images" in page.text and "monosemanticity 0.5" in page.text


def test_a_concept_of_another_sae_is_refused(sae):
    with pytest.raises(EditError, match="another SAE"):
        render_concept(sae, Concept("c", (D_SAE,)))


def test_what_never_fires_has_a_page(model, sae, processor):
    with torch.no_grad():
        sae.sae.threshold[5] = 1e9
    concept = Concept("silent", (5,))
    found = look(model, sae, concept, pictures(2, 1), pictures(2, 2), processor=processor)
    text = said(render_concept(sae, concept, found))
    assert "It fires on none of the images." in text and "AUROC 0.500" in text and "nan" not in text


def test_looking_leaves_the_model_as_it_was(model, sae, processor):
    from tiny import snapshot, weights

    before, values_before = snapshot(model), weights(model)
    look(model, sae, sae.concepts["tiger"], pictures(2), pictures(2, 1), processor=processor)
    assert snapshot(model) == before
    assert all(torch.equal(tensor, values_before[name]) for name, tensor in weights(model).items())


# The command. ---------------------------------------------------------------------------------------------------------


def test_the_bundled_concepts_bring_their_images(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_CONCEPT_SCENES", 6)
    monkeypatch.setattr(cli, "_SIBLING_SCENES", 2)
    result = runner.invoke(cli.app, ["concept", "show", "bundled", "soccer", "--out", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    assert result.output.strip().endswith(str(tmp_path / "page.html"))
    text = said((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "6 images with it and 6 without" in text
    assert all(sibling in text for sibling in scenes.DOMAINS["sport"])


def test_the_command_refuses_what_it_cannot_show(tmp_path):
    out = ["--out", str(tmp_path / "page.html")]
    result = runner.invoke(cli.app, ["concept", "show", "bundled", "tigre", *out])
    assert result.exit_code == 1
    assert "Did you mean 'tiger'?" in result.output
    for half in (
        ["--model", "bundled"],
        ["--positives", str(tmp_path)],
        ["--model", "bundled", "--negatives", str(tmp_path)],
    ):
        result = runner.invoke(cli.app, ["concept", "show", str(scenes.asset("sae")), "tiger", *half, *out])
        assert (result.exit_code, "missing" in result.output) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_ones_own_images_and_none_at_all(tmp_path):
    for name, kind in (("with", {"contains": "tiger"}), ("without", {"lacks": "tiger"})):
        (tmp_path / name).mkdir()
        for i, scene in enumerate(scenes.sample(3, seed=1, **kind)):
            scene.image.save(tmp_path / name / f"{i}.png")
    VisionSAE.load(scenes.asset("sae")).save(tmp_path / "sae")
    show = ["concept", "show", str(tmp_path / "sae"), "tiger", "--out", str(tmp_path / "page.html")]
    images = ["--model", "bundled", "--positives", str(tmp_path / "with"), "--negatives", str(tmp_path / "without")]
    for more, expected in (([], "No images were given"), (images, "3 images with it and 3 without")):
        result = runner.invoke(cli.app, [*show, *more])
        assert result.exit_code == 0, result.output
        assert expected in said((tmp_path / "page.html").read_text(encoding="utf-8"))
