"""One pass over images for all that they tell of an SAE: row statistics, top images, monosemanticity."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from sauce_hooks.activations import iter_images, read_tokens
from sauce_hooks.errors import ImagesError
from sauce_hooks.sae.gallery import TOP_IMAGES, Gallery
from sauce_hooks.sae.statistics import CHUNK, RowSums
from sauce_hooks.sae.vision_sae import FeatureStats, VisionSAE

Embed = Callable[[list[Image.Image]], Float[Tensor, "n e"]]
"""From images to vectors whose cosine says how alike the images are."""

THUMBNAIL_SIDE, _QUALITY = 64, 60
MAX_THUMBNAIL_BYTES = 15 * 2**20
"""Thumbnails that are kept with an SAE, in all; the most monosemantic features' images come first."""
_OWN_EMBEDDING = "mean token at the hook point, minus the SAE's b_dec"
_MOST_IMAGES = 2**31 - 1


class TopImages:
    """Each feature's k strongest images, in a stream of images. Ties go to the earlier image.

    A strength and its image are one integer, the bits of the (not negative) float above those of the image's number counted
    down. So larger is better, no two are equal, and the result is the same however the stream is cut.
    """

    def __init__(self, d_sae: int, k: int, device: torch.device) -> None:
        self.keys_fk = torch.zeros(d_sae, k, dtype=torch.int64, device=device)

    def add(self, strength_bf: Float[Tensor, "b d_sae"], first: int) -> None:
        """Take in images number `first` and the following."""
        numbers_b = torch.arange(first, first + len(strength_bf), device=strength_bf.device)
        bits_fb = strength_bf.float().T.contiguous().view(torch.int32).long()
        keys_fb = torch.where(bits_fb > 0, (bits_fb << 32) | (_MOST_IMAGES - numbers_b), 0)
        self.keys_fk = torch.cat([self.keys_fk, keys_fb], 1).topk(self.keys_fk.shape[1], dim=1).values

    @property
    def images_fk(self) -> Int[Tensor, "d_sae k"]:
        """Numbers of the images, −1 where there are fewer."""
        return torch.where(self.keys_fk > 0, _MOST_IMAGES - (self.keys_fk & _MOST_IMAGES), -1)

    @property
    def strengths_fk(self) -> Float[Tensor, "d_sae k"]:
        """Their strengths, 0 where there are fewer."""
        return (self.keys_fk >> 32).int().view(torch.float32)


class PairSums:
    """Sums over images from which the mean similarity of weighted pairs follows, for every feature at once.

    With r_n = (a_n − min a) / (max a − min a) and s the cosine similarity of embeddings, the score is
    Σ_{n<m} r_n r_m s_nm / Σ_{n<m} r_n r_m. The scale of r cancels, so w_n = a_n − min a will do; and with unit embeddings e

        2 Σ_{n<m} w_n w_m s_nm = ‖Σ w_n e_n‖² − Σ w_n²        2 Σ_{n<m} w_n w_m = (Σ w_n)² − Σ w_n².

    The minimum is known at the end only, and the sums of a, a² and a·e give those of w. Memory is O(d_sae · e).
    """

    def __init__(self, d_sae: int, d_embed: int, device: torch.device) -> None:
        zeros: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.n = 0
        self.e_e = torch.zeros(d_embed, **zeros)
        self.ae_fe = torch.zeros(d_sae, d_embed, **zeros)
        self.a_f, self.aa_f, self.fired_f = (torch.zeros(d_sae, **zeros) for _ in range(3))
        self.min_f = torch.full((d_sae,), torch.inf, **zeros)
        self.norms = torch.zeros((), **zeros)

    def add(self, a_bf: Float[Tensor, "b d_sae"], embeddings_be: Float[Tensor, "b e"]) -> None:
        """Take in a few images: their activations, and embeddings of any length but zero."""
        a_bf = a_bf.double()
        e_be = F.normalize(embeddings_be.to(a_bf), dim=1)
        self.n += len(a_bf)
        self.e_e += e_be.sum(0)
        self.ae_fe.addmm_(a_bf.T, e_be)
        self.a_f += a_bf.sum(0)
        self.aa_f += a_bf.pow(2).sum(0)
        self.fired_f += (a_bf != 0).sum(0)
        self.min_f = torch.minimum(self.min_f, a_bf.amin(0))
        self.norms += e_be.pow(2).sum()

    def scores(self) -> tuple[Float[Tensor, " d_sae"], float]:
        """The score of every feature, NaN if fewer than two images weigh anything; and the mean similarity of all pairs.

        Raises:
            ImagesError: an embedding is zero or not finite.
        """
        if not abs(float(self.norms) - self.n) < 1e-6 * self.n:
            raise ImagesError("an image's embedding is zero or not finite: it has no cosine similarity to others")
        total_f = self.a_f - self.n * self.min_f
        squares_f = self.aa_f - 2 * self.min_f * self.a_f + self.n * self.min_f.pow(2)
        size = max(1, CHUNK // len(self.e_e) // 16)
        weighted_f = torch.cat(
            [
                (ae_fe - min_f[:, None] * self.e_e).square_().sum(1)
                for ae_fe, min_f in zip(self.ae_fe.split(size), self.min_f.split(size), strict=True)
            ]
        )
        pairs_f = total_f.pow(2) - squares_f
        # Where one image weighs all there is, or all weigh the same as the least, only rounding is left.
        defined_f = (self.fired_f >= 2) & (pairs_f > 1e-9 * total_f.pow(2)) & (total_f > 1e-9 * self.a_f)
        score_f = torch.where(defined_f, (weighted_f - squares_f) / pairs_f, torch.nan).clamp(-1, 1)
        all_pairs = self.n * (self.n - 1)
        null = (float(self.e_e.pow(2).sum()) - self.n) / all_pairs if all_pairs else float("nan")
        return score_f.float().cpu(), null


@torch.no_grad()
def describe_features(
    model: nn.Module,
    sae: VisionSAE,
    images: Any,
    *,
    processor: Any,
    embed: Embed | None = None,
    k: int = TOP_IMAGES,
    batch_size: int = 64,
) -> tuple[FeatureStats, Gallery]:
    """Statistics, top images and monosemanticity scores of an SAE's features, in one streaming pass.

    Firing shares are the paper's Eq. 7 and mean activations its Eq. 8. An image's activation of a feature is the largest
    over the tokens the SAE reads, max |z|. The monosemanticity score is that of Pach et al. 2025 (arXiv 2504.02821): the
    mean similarity of two images, weighted by how strongly the feature fires on both; 1 if it fires on one kind of image
    only, and `null_similarity` if on any. The paper measures similarity with an encoder that has nothing to do with the
    SAE (DINOv2, say): give one as `embed` to compare with it. By default the image's own mean token at the hook point
    stands in, which favours what the SAE itself sees. Scores with different embeddings must not be compared.

    Args:
        model: the model whose tower the SAE belongs to; left exactly as it was.
        sae: the SAE; its `tokens.read` says which tokens of an image count.
        images: a folder, paths, PIL images or a Hugging Face dataset. No model inputs: their pictures are not to be had.
        processor: the model's processor.
        embed: from a list of PIL images to a vector each, `[n, e]`, of any length.
        k: top images of a feature.
        batch_size: images a forward of the tower.

    Returns:
        The statistics and the gallery; `sae` stays as it is.

    Raises:
        ImagesError: no readable image, or an embedding that is zero.
        SAEMismatchError: the SAE belongs to another tower.
    """
    place = sae.locate(model)
    waiting: deque[Image.Image] = deque()

    def pictures() -> Iterator[Image.Image]:
        for image in iter_images(images):
            waiting.append(image)
            yield image

    sums: RowSums | None = None
    pairs: PairSums | None = None
    top = TopImages(sae.d_sae, k, torch.device(sae.sae.device))
    thumbnails: dict[int, bytes] = {}
    n = 0
    batches = read_tokens(model, pictures(), place, tokens=sae.tokens.read, processor=processor, batch_size=batch_size)
    for acts_btd in batches:
        acts_btd = acts_btd.to(sae.sae.device, sae.sae.dtype)
        batch = [waiting.popleft() for _ in range(len(acts_btd))]
        vectors_be = _own_embedding(sae, acts_btd) if embed is None else embed(batch)
        if pairs is None:
            pairs = PairSums(sae.d_sae, vectors_be.shape[1], acts_btd.device)
        done = 0
        for part, strength_bf in _encoded(sae, acts_btd):
            sums = part if sums is None else sums + part
            pairs.add(strength_bf, vectors_be[done : done + len(strength_bf)])
            top.add(strength_bf, n + done)
            done += len(strength_bf)
        wanted = set(top.images_fk.unique().tolist())  # the one time a batch that the host waits
        made = {n + i: _jpeg(image) for i, image in enumerate(batch) if n + i in wanted}
        thumbnails = {i: jpeg for i, jpeg in (thumbnails | made).items() if i in wanted}
        n += len(batch)
    assert sums is not None and pairs is not None  # reading no images raises
    scores_f, null = pairs.scores()
    images_fk, strengths_fk = top.images_fk.int().cpu(), top.strengths_fk.cpu()
    gallery = Gallery(
        images_fk=images_fk,
        strengths_fk=strengths_fk,
        monosemanticity_f=scores_f,
        null_similarity=null,
        embedding=_OWN_EMBEDDING if embed is None else getattr(embed, "__qualname__", type(embed).__name__),
        n_images=n,
        thumbnails=_affordable(thumbnails, images_fk, scores_f),
    )
    return sums.stats(), gallery


def _encoded(sae: VisionSAE, acts_btd: Float[Tensor, "b t d_in"]) -> Iterator[tuple[RowSums, Float[Tensor, "_ d_sae"]]]:
    """Row sums and max |z| over tokens, of a few images at a time; z never has more than `CHUNK` entries."""
    tokens = max(1, CHUNK // sae.d_sae)
    for some_btd in acts_btd.split(max(1, tokens // acts_btd.shape[1])):
        sums: RowSums | None = None
        strength_bf = some_btd.new_zeros(len(some_btd), sae.d_sae)
        for x_btd in some_btd.split(tokens, dim=1):
            x_nd = x_btd.flatten(0, 1)
            z_nf = sae.encode(x_nd)
            part = RowSums.of(x_nd, z_nf, sae.decode(z_nf))
            sums = part if sums is None else sums + part
            z_btf = z_nf.view(*x_btd.shape[:2], -1)
            strength_bf = torch.maximum(strength_bf, torch.maximum(z_btf.amax(1), -z_btf.amin(1)))
        assert sums is not None  # images have tokens
        yield sums, strength_bf


def _own_embedding(sae: VisionSAE, acts_btd: Float[Tensor, "b t d_in"]) -> Float[Tensor, "b d_in"]:
    return acts_btd.double().mean(1) - sae.sae.b_dec.double()


def _jpeg(image: Image.Image) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    small.info = {}  # where the photo was taken, and the like
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return buffer.getvalue()


def _affordable(
    thumbnails: dict[int, bytes], images_fk: Int[Tensor, "d_sae k"], scores_f: Float[Tensor, " d_sae"]
) -> dict[int, bytes]:
    """As many thumbnails as may be kept, those of the features with the best scores first."""
    if sum(map(len, thumbnails.values())) <= MAX_THUMBNAIL_BYTES:
        return thumbnails
    kept: dict[int, bytes] = {}
    size = 0
    best_first = scores_f.nan_to_num(-torch.inf).argsort(descending=True, stable=True)
    for number in images_fk[best_first].flatten().tolist():
        if number >= 0 and number not in kept:
            size += len(thumbnails[number])
            if size > MAX_THUMBNAIL_BYTES:
                break
            kept[number] = thumbnails[number]
    return kept
