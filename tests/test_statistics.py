"""What a trained SAE tells of its features: exact, however the rows or images come."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save

from sauce_hooks import VisionSAE, read_activations
from sauce_hooks.errors import ImagesError, SAEFileError
from sauce_hooks.sae import FeatureStats, describe, statistics
from sauce_hooks.sae.describe import PairSums, TopImages, describe_features
from sauce_hooks.sae.gallery import Gallery
from sauce_hooks.sae.statistics import RowSums, feature_stats
from sauce_hooks.sae.vision_sae import DENSE_ABOVE, LossAdded
from tiny import D_IN, D_SAE, make_sae, make_vision_sae, pictures, snapshot, weights

ARCHITECTURES = {
    "standard": {},
    "gated": {},
    "topk": {"k": 8},
    "abstopk": {"k": 8},
    "jumprelu": {},
    "matching_pursuit": {"max_iterations": 6, "residual_threshold": 1e-3},
}
seeds = st.integers(0, 1000)
cuts = st.lists(st.integers(0, 20), max_size=4).map(sorted)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def pieces(tensor, cuts):
    """A tensor in parts, some of which may be empty."""
    return [part for part in tensor.tensor_split(cuts) if len(part)]


def assert_alike(one, other):
    for name in ("frequency_f", "mean_when_active_f", "largest_f"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name))
    for name in ("explained_variance", "l0", "n_rows"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-5)


# Rows. ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@given(seed=seeds, cuts=cuts)
@torch.no_grad()
def test_statistics_of_rows_are_their_definitions_however_the_rows_are_cut(architecture, seed, cuts):
    sae = make_sae(architecture, seed=seed, dtype="float64", **ARCHITECTURES[architecture])
    x = torch.randn(20, D_IN, generator=generator(seed), dtype=torch.float64)
    found = feature_stats(sae, pieces(x, cuts))
    z = sae.encode(x)
    fires = z != 0
    torch.testing.assert_close(found.frequency_f.double(), fires.double().mean(0), atol=1e-7, rtol=1e-6)
    mean = torch.where(fires.any(0), z.sum(0) / fires.sum(0), 0.0)
    torch.testing.assert_close(found.mean_when_active_f.double(), mean, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(found.largest_f.double(), z.abs().amax(0), atol=1e-7, rtol=1e-6)
    left = (x - sae.decode(z)).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    assert found.explained_variance == pytest.approx(1 - left.item(), rel=1e-9)
    assert found.l0 == pytest.approx(fires.sum(1).double().mean().item(), rel=1e-12)
    assert found.n_rows == 20


def test_negative_activations_fire_too():
    sae = make_sae("abstopk", k=8)
    x = torch.randn(50, D_IN, generator=generator(0))
    with torch.no_grad():
        assert (sae.encode(x) < 0).any()
    found = feature_stats(sae, [x])
    assert found.l0 == 8
    assert (found.mean_when_active_f < 0).any() and (found.largest_f >= 0).all()


@given(seed=seeds, cut=st.integers(1, 19))
@torch.no_grad()
def test_sums_of_two_sets_of_rows_add_up(seed, cut):
    sae = make_sae(seed=seed, dtype="float64")
    x = torch.randn(20, D_IN, generator=generator(seed), dtype=torch.float64)
    sums = [RowSums.of(part, sae.encode(part), sae.decode(sae.encode(part))) for part in (x, x[:cut], x[cut:])]
    assert_alike(sums[0].stats(), (sums[1] + sums[2]).stats())
    assert_alike(sums[0].stats(), (sums[2] + sums[1]).stats())


def test_z_is_made_a_bounded_part_at_a_time(monkeypatch):
    sae = make_sae()
    x = torch.randn(100, D_IN, generator=generator(1))
    whole, sizes, encode = feature_stats(sae, [x]), [], sae.encode
    monkeypatch.setattr(statistics, "CHUNK", 7 * D_SAE + 1)
    monkeypatch.setattr(sae, "encode", lambda rows: (sizes.append(len(rows)), encode(rows))[1])
    assert_alike(whole, feature_stats(sae, [x]))
    assert max(sizes) == 7 and sum(sizes) == 100


def test_no_rows_are_an_error_and_rows_all_alike_have_no_variance_to_explain():
    for nothing in ([], [torch.zeros(0, D_IN)]):
        with pytest.raises(ImagesError, match="no rows"):
            feature_stats(make_sae(), nothing)
    for n in (1, 2, 3, 7, 50):  # of some of these, rounding leaves a variance that is not zero
        alike = torch.randn(1, D_IN, generator=generator(n)).expand(n, -1)
        assert np.isnan(feature_stats(make_sae(), [alike]).explained_variance)


@torch.no_grad()
def test_in_bf16_the_error_itself_is_not_rounded():
    sae, x = make_sae(dtype="bfloat16"), torch.randn(200, D_IN, generator=generator(0)).bfloat16()
    left = (x.double() - sae.decode(sae.encode(x)).double()).pow(2).sum() / (x.double() - x.double().mean(0)).pow(2).sum()
    assert feature_stats(sae, [x]).explained_variance == pytest.approx(1 - left.item(), rel=1e-9)


def test_dead_and_dense_are_shares_of_features():
    stats = FeatureStats(torch.tensor([0.0, 0.0, 0.05, DENSE_ABOVE + 0.01, 1.0]), torch.ones(5), 0.5, 1.0, 100)
    assert (stats.dead_share, stats.dense_share) == (pytest.approx(0.4), pytest.approx(0.4))


# Monosemanticity. ----------------------------------------------------------------------------------------------------


def naive_score(a_n, e_ne):
    """The paper's double sum."""
    if (a_n != 0).sum() < 2 or a_n.max() == a_n.min():
        return float("nan")
    r = (a_n - a_n.min()) / (a_n.max() - a_n.min())
    s = torch.nn.functional.cosine_similarity(e_ne[:, None], e_ne[None], dim=-1)
    above = torch.ones(len(a_n), len(a_n), dtype=torch.float64).triu(1)
    weight = (r[:, None] * r[None] * above).sum()
    return ((r[:, None] * r[None] * s * above).sum() / weight).item() if weight > 0 else float("nan")


def activations(seed, n=20, d_sae=12):
    """Of images: sparse ones, one that fires on all, one that is the same on all, one on two images, one, none."""
    a = torch.relu(torch.randn(n, d_sae, generator=generator(seed), dtype=torch.float64))
    a[:, 0] += 3
    a[:, 1] = 0.7
    a[:, 2:5] = 0
    a[3, 2] = a[5, 2] = a[3, 3] = 1.5
    return a


def pair_sums(a, e, cuts=()):
    sums = PairSums(a.shape[1], e.shape[1], torch.device("cpu"))
    for part in zip(pieces(a, list(cuts)), pieces(e, list(cuts)), strict=True):
        sums.add(*part)
    return sums


@given(seed=seeds, cuts=cuts, scale=st.floats(0.1, 10), shift=st.floats(0, 5))
def test_monosemanticity_is_the_papers_double_sum_however_the_images_come(seed, cuts, scale, shift):
    a, e = activations(seed), torch.randn(20, 6, generator=generator(seed + 1), dtype=torch.float64) + 0.5
    scores, null = pair_sums(a, e, cuts).scores()
    expected = torch.tensor([naive_score(a[:, f], e) for f in range(a.shape[1])])
    assert torch.equal(scores.isnan(), expected.isnan())
    assert scores.isnan().nonzero().flatten().tolist() == [1, 3, 4]
    torch.testing.assert_close(scores, expected, equal_nan=True, atol=1e-6, rtol=1e-6)
    similarity = torch.nn.functional.cosine_similarity(e[:, None], e[None], dim=-1)
    assert null == pytest.approx(((similarity.sum() - 20) / 380).item(), rel=1e-9)
    # Activations are scaled to [0, 1] and embeddings to length one, so neither unit matters.
    again = pair_sums(scale * a, e * torch.linspace(0.1, 3, 20)[:, None]).scores()[0]
    torch.testing.assert_close(again, scores, equal_nan=True)
    moved = pair_sums(a[:, :1] + shift, e).scores()[0]
    torch.testing.assert_close(moved, scores[:1])


def test_a_feature_of_one_kind_of_image_scores_one_and_of_every_kind_the_null():
    kinds = torch.eye(4, dtype=torch.float64).repeat(5, 1)
    a = torch.stack([kinds[:, 0], torch.ones(20, dtype=torch.float64)], 1)
    a = torch.cat([a, a.new_zeros(1, 2)])  # an image on which neither fires
    scores, null = pair_sums(a, torch.cat([kinds, kinds[:1]])).scores()
    assert scores[0] == 1
    assert scores[1].item() == pytest.approx(4 * 10 / 190)
    assert null == pytest.approx((3 * 10 + 15) / 210)


@pytest.mark.parametrize("damage", [0.0, float("nan")])
def test_an_embedding_without_a_direction_is_an_error(damage):
    e = torch.randn(20, 3, generator=generator(0))
    e[4] = damage
    with pytest.raises(ImagesError, match="embedding"):
        pair_sums(activations(0), e).scores()


# Top images. ---------------------------------------------------------------------------------------------------------


@given(seed=seeds, cuts=cuts, k=st.integers(1, 25))
def test_top_images_are_the_strongest_and_of_equals_the_first(seed, cuts, k):
    strength = torch.randint(0, 4, (20, 7), generator=generator(seed)).float() / 3  # many ties, many zeros
    top, first = TopImages(7, k, torch.device("cpu")), 0
    for part in pieces(strength, cuts):
        top.add(part, first)
        first += len(part)
    for feature in range(7):
        order = sorted((i for i in range(20) if strength[i, feature] > 0), key=lambda i: (-strength[i, feature], i))[:k]
        padding = k - len(order)
        assert top.images_fk[feature].tolist() == order + [-1] * padding
        assert top.strengths_fk[feature].tolist() == [strength[i, feature].item() for i in order] + [0] * padding


# All of it, from a model and images. ---------------------------------------------------------------------------------

IMAGES = pictures(11)


@pytest.mark.parametrize("architecture", ["jumprelu", "topk", "abstopk"])
def test_describing_is_exact_whatever_the_sizes_of_its_parts(model, processor, monkeypatch, architecture):
    sae = make_vision_sae(model, architecture, **ARCHITECTURES[architecture])
    before, values = snapshot(model), weights(model)
    stats, gallery = describe_features(model, sae, IMAGES, processor=processor, k=4)
    assert snapshot(model) == before
    assert all(torch.equal(value, values[name]) for name, value in weights(model).items())

    rows = torch.cat(list(read_activations(model, IMAGES, sae.hook_point, processor=processor)))
    assert_alike(stats, feature_stats(sae.sae, [rows]))
    z = sae.encode(rows).unflatten(0, (11, -1)).abs().amax(1)
    for feature in range(D_SAE):
        order = [i for i in z[:, feature].argsort(descending=True, stable=True).tolist() if z[i, feature] > 0][:4]
        assert [i for i in gallery.images_fk[feature].tolist() if i >= 0] == order
        torch.testing.assert_close(gallery.strengths_fk[feature, : len(order)], z[order, feature])
    own = rows.unflatten(0, (11, -1)).mean(1) - sae.sae.b_dec.detach()
    expected = torch.tensor([naive_score(z[:, f].double(), own.double()) for f in range(D_SAE)])
    torch.testing.assert_close(gallery.monosemanticity_f, expected, equal_nan=True, atol=1e-4, rtol=1e-4)
    assert set(gallery.thumbnails) == set(gallery.images_fk.unique().tolist()) - {-1}
    assert gallery.n_images == 11

    monkeypatch.setattr(describe, "CHUNK", 5 * D_SAE)  # fewer rows than an image has tokens
    again = describe_features(model, sae, IMAGES, processor=processor, k=4, batch_size=3)
    assert_alike(again[0], stats)
    assert torch.equal(again[1].images_fk, gallery.images_fk)
    assert again[1].thumbnails == gallery.thumbnails


def test_similarity_is_that_of_the_embedding_given(model, processor):
    sae = make_vision_sae(model)
    seen = []

    def brightness(images):
        seen.extend(images)
        return torch.tensor([[np.asarray(image).mean() - 127.5, 1.0] for image in images])

    _, gallery = describe_features(model, sae, IMAGES, processor=processor, embed=brightness, batch_size=4)
    assert [image.tobytes() for image in seen] == [image.tobytes() for image in IMAGES]
    assert "brightness" in gallery.embedding
    _, same = describe_features(model, sae, IMAGES, processor=processor, embed=lambda images: torch.ones(len(images), 2))
    alive = ~same.monosemanticity_f.isnan()
    assert alive.any()
    torch.testing.assert_close(same.monosemanticity_f[alive], torch.ones(int(alive.sum())))
    assert same.null_similarity == pytest.approx(1)


def test_thumbnails_are_small_and_say_nothing_else(model, processor):
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    stored = io.BytesIO()
    Image.new("RGB", (640, 320), "teal").save(stored, "JPEG", exif=exif)
    photo = Image.open(io.BytesIO(stored.getvalue()))
    _, gallery = describe_features(model, make_vision_sae(model), [photo, *IMAGES[:1]], processor=processor)
    small = Image.open(io.BytesIO(gallery.thumbnails[0]))
    assert small.size == (64, 32)
    assert not small.getexif() and b"where I live" not in gallery.thumbnails[0]


def test_when_thumbnails_are_too_many_the_best_features_keep_theirs(monkeypatch):
    monkeypatch.setattr(describe, "MAX_THUMBNAIL_BYTES", 30)
    images = torch.tensor([[0, 1], [2, 3], [4, -1]])
    kept = describe._affordable({i: bytes(10) for i in range(5)}, images, torch.tensor([0.2, float("nan"), 0.9]))
    assert set(kept) == {4, 0, 1}


# Files. --------------------------------------------------------------------------------------------------------------

LOSS = LossAdded(1.0, 1.5, 3.0, 0.25, 0.75, 0.5, 0.9, 10, 100, "true")


@pytest.fixture
def described(model, processor):
    sae = make_vision_sae(model)
    stats, sae.gallery = describe_features(model, sae, IMAGES, processor=processor)
    sae.stats = replace(stats, loss_added=LOSS)
    return sae


def test_what_was_found_is_loaded_again(described, tmp_path):
    described.save(tmp_path / "sae")
    loaded = VisionSAE.load(tmp_path / "sae")
    assert loaded.stats.loss_added == LOSS
    assert (LOSS.added, LOSS.recovered) == (0.5, 0.75)
    assert torch.equal(loaded.stats.largest_f, described.stats.largest_f)
    for name, value in vars(described.gallery).items():
        found = getattr(loaded.gallery, name)
        assert torch.equal(found.nan_to_num(9), value.nan_to_num(9)) if isinstance(value, torch.Tensor) else found == value


def test_a_folder_without_pictures_is_whole_and_saving_without_them_takes_them_away(described, tmp_path):
    described.save(tmp_path / "sae")
    assert (tmp_path / "sae" / "gallery.safetensors").exists()
    described.gallery = None
    described.save(tmp_path / "sae")
    assert not (tmp_path / "sae" / "gallery.safetensors").exists()
    assert VisionSAE.load(tmp_path / "sae").gallery is None


def test_a_gallery_of_no_pictures_is_one_too(described, tmp_path):
    described.gallery = replace(described.gallery, thumbnails={})
    described.save(tmp_path / "sae")
    assert VisionSAE.load(tmp_path / "sae").gallery.thumbnails == {}


def test_saving_to_a_link_replaces_what_it_leads_to(described, tmp_path):
    described.save(tmp_path / "sae")
    (tmp_path / "sae" / "README.md").write_text("a model card")
    (tmp_path / "link").symlink_to(tmp_path / "sae")
    described.gallery = None
    described.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "sae" / "README.md").exists()
    assert VisionSAE.load(tmp_path / "sae").gallery is None


@pytest.mark.parametrize(
    "change",
    [
        {"stats": {"explained_variance": "<b>"}},
        {"stats": {"n_rows": float("inf")}},
        {"stats": {"loss_added": {"original": "<b>"}}},
        {"stats": {"loss_added": {"n_images": None}}},
    ],
)
def test_statistics_that_are_no_numbers_are_refused(described, tmp_path, change):
    described.save(tmp_path / "sae")
    path = tmp_path / "sae" / "vision_sae.json"
    record = json.loads(path.read_text())
    for name, value in change["stats"].items():
        record["stats"][name] = record["stats"][name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(record))
    with pytest.raises(SAEFileError):
        VisionSAE.load(tmp_path / "sae")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("images", lambda t: t + 11),
        ("images", lambda t: t - 11),
        ("images", lambda t: t.float()),
        ("images", lambda t: t.flatten()),
        ("monosemanticity", lambda t: t[:, None].repeat(1, 2)),
        ("thumbnail_images", lambda t: t + 2**30),
        ("thumbnail_images", lambda t: t - 100),
        ("thumbnail_sizes", lambda t: t.double() * torch.inf),
        ("thumbnail_sizes", lambda t: -t),
        ("thumbnail_sizes", lambda t: t * 1000),
        ("facts", {"n_images": float("inf")}),
        ("facts", {"n_images": 3}),
        ("facts", {"null_similarity": "high"}),
        ("facts", {"format": 99}),
    ],
)
def test_a_gallery_of_impossible_entries_is_refused(described, tmp_path, name, value):
    path = tmp_path / "gallery.safetensors"
    described.gallery.save(path)
    Gallery.load(path, D_SAE)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(file.metadata()["gallery"])
    if name == "facts":
        facts |= value
    else:
        tensors[name] = value(tensors[name])
        if name == "images" and tensors[name].ndim == 1:
            tensors["strengths"] = tensors["strengths"].flatten()
    path.write_bytes(save(tensors, {"gallery": json.dumps(facts)}))
    with pytest.raises(SAEFileError):
        Gallery.load(path, D_SAE)


@pytest.mark.parametrize("content", [b"", b"\xff\x00noise", "weights", "another SAE", "fewer rows", "cut"])
def test_a_damaged_or_foreign_gallery_is_refused(described, tmp_path, content):
    folder = tmp_path / "sae"
    described.save(folder)
    path = folder / "gallery.safetensors"
    if content == "weights":
        content = (folder / "sae_weights.safetensors").read_bytes()
    elif content == "another SAE":
        more = {name: torch.cat([t, t]) for name, t in vars(described.gallery).items() if isinstance(t, torch.Tensor)}
        replace(described.gallery, **more).save(path)
        content = path.read_bytes()
    elif content == "fewer rows":
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            content = save({**tensors, "images": tensors["images"][1:]}, file.metadata())
    elif content == "cut":
        content = path.read_bytes()[:-5]
    path.write_bytes(content)
    with pytest.raises(SAEFileError):
        VisionSAE.load(folder)
