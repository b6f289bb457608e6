"""Training an SAE at a hook point. SAE-Lens trains; this adapts its data, its start and its end to vision towers."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sauce_hooks.activations import (
    ActivationCache,
    CacheRecord,
    ImageLoader,
    MemoryStore,
    RowStream,
    SharedStore,
    ShuffleBuffer,
    World,
)
from sauce_hooks.errors import ActivationCacheError, ImagesError, PresetError, ResumeError, UnreadableImageWarning
from sauce_hooks.hookpoint import HookPoint, TokenPolicy, default_policy, find_hook_point, unwrap
from sauce_hooks.sae.checkpoint import TrainingFolder, changes, reading
from sauce_hooks.sae.feed import Feed
from sauce_hooks.sae.inference import build, for_inference, settle_threshold
from sauce_hooks.sae.initialization import center
from sauce_hooks.sae.journal import Journal, check_trackers
from sauce_hooks.sae.loop import Schedule, Training
from sauce_hooks.sae.parallel import check_divides
from sauce_hooks.sae.presets import PRESETS, Preset
from sauce_hooks.sae.statistics import feature_stats
from sauce_hooks.sae.vision_sae import VisionSAE

if TYPE_CHECKING:
    from sae_lens.training.sae_trainer import SAETrainer

_SAMPLE_ROWS = 16_384
"""Rows that the decoder bias is initialised from, and that an epoch's number of rows is judged by."""
_SAMPLE_PER_IMAGE = 16
"""Of which no image gives many more than so many, so that they are of a thousand images at least."""
_STATS_ROWS = 131_072
"""Rows the feature statistics are taken from."""
_VALIDATION_ROWS = 16_384
"""Rows of other images that the SAE is tested on while it trains."""
_BUFFER_BATCHES = 32
"""Optimiser batches that the shuffle buffer holds."""
_KEPT_BYTES = {"cuda": 8 * 2**30}
"""Rows of at most this size are kept on the model's device for the later epochs; 2 GiB on other devices."""


@dataclass(frozen=True)
class _Plan:
    """What the first rows tell about all of them."""

    n_rows: int
    """Of an epoch."""
    steps: int
    """Of the training."""
    in_memory: bool
    order: dict[str, Any] | None
    """How the images came when the cache was filled, if there is one."""
    scale: float
    """Rows are multiplied by this before training, and the SAE's weights take it up afterwards."""


def train_sae(
    model: nn.Module,
    images: Any,
    *,
    processor: Any = None,
    preset: str | Preset = "sauce",
    hook_point: HookPoint | None = None,
    tokens: TokenPolicy | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    cache: str | Path | None = None,
    keep_in_memory: int | None = None,
    validation: Any = None,
    n_images: int | None = None,
    max_broken: float = 0.05,
    workers: int | None = None,
    image_batch_size: int = 64,
    checkpoint_every: int = 1_000,
    log_every: int = 50,
    log_to: Sequence[str] = (),
    autocast: bool | None = None,
    compile_step: bool = False,
    seed: int = 0,
    progress: bool = True,
    **changes: Any,
) -> VisionSAE:
    """Train a sparse autoencoder on one block of a vision tower, with SAE-Lens's `SAETrainer`.

    The language model never runs and the tower stops at the hooked block. Images are decoded in worker processes, their
    rows go through a shuffle buffer on the model's device. The first epoch's rows are kept in memory if they are few
    enough, on disk if there is a `cache`, and otherwise read anew in every epoch.

    Started by `accelerate launch` or `torchrun`, all processes train one SAE: each reads a part of the images and takes its
    part of every batch, and the loss is that of one process with the same batch size.

    Args:
        model: the vision-language model; left exactly as it was.
        images: a folder, paths, PIL images, a Hugging Face dataset (streaming too), WebDataset shards, or a list of batches
            of model inputs. Read once an epoch, so no one-shot iterator.
        processor: the model's processor.
        preset: a name in `PRESETS` ("sauce": the paper's; "batchtopk": a better modern one) or a `Preset`.
        hook_point: where; the penultimate block by default.
        tokens: which tokens it is trained on and an eraser will edit; the preset's by default.
        out: a folder to save to, with no SAE in it yet. `training/` in it holds settings, metrics and names of broken
            images, and checkpoints until done.
        resume: go on from the checkpoint in `out`, if there is one: on a CPU the result is bit for bit that of an unbroken
            run. A training that is finished is loaded.
        cache: a folder for the rows, in bfloat16 (docs/cache.md); what an earlier training has put there is used.
        keep_in_memory: bytes of rows that may be kept on the model's device instead of being read again; by default 2 GiB,
            8 GiB on CUDA.
        validation: other images, which metrics are also measured on.
        n_images: use so many of the images in an epoch; needed for a stream that does not say how many it has.
        max_broken: the share of images that cannot be read which ends the training.
        workers: processes that decode images; by default as many as there are cores to spare.
        image_batch_size: images a forward of the tower.
        checkpoint_every: steps between checkpoints.
        log_every: steps between metrics. Only then is anything read back from the device.
        log_to: dashboards for them, "tensorboard" or "wandb", besides `training/metrics.jsonl`.
        autocast: train in bfloat16 where that is safe (float32 weights); by default on CUDA.
        compile_step: compile the SAE's forward pass with `torch.compile`.
        seed: decides initial weights and the order of images and rows.
        progress: show a progress bar.
        **changes: fields of `Preset` to change, for example `expansion=8, epochs=1`.

    Raises:
        ImagesError: no readable image, too many broken ones, or fewer rows than a batch.
        PresetError: an unknown preset or dashboard.
        SAEFileError: `out` cannot be written to, is in use, or holds an SAE or a training that is not to be gone on with.
        OSError: a full disk; what was saved before is whole.
        ResumeError: settings, model or data are not those of the training to go on with; says which.
        ActivationCacheError: the cache is of another model, layer, choice of tokens or data; says which.
        NonFiniteActivationsError: NaN or infinity in an activation.
        DivergedError: NaN or infinity in the loss; the last good checkpoint is kept.
        KeyboardInterrupt, SystemExit: on SIGINT or SIGTERM, after a checkpoint if there was a step.
    """
    recipe = _recipe(preset, changes)
    hook_point = hook_point or find_hook_point(model)
    tokens = tokens or replace(recipe.tokens, edit=default_policy(hook_point).edit)
    world = World.current()
    check_divides(recipe.batch_size, world)
    check_trackers(log_to)
    tower = hook_point.tower_module(unwrap(model))
    first = next(p for p in tower.parameters() if p.is_floating_point())
    device = first.device
    folder = TrainingFolder(out) if out is not None else None
    fixed = hook_point.layout.fixed

    def loader_of(data: Any, **options: Any) -> ImageLoader:
        size = image_batch_size if fixed else 1
        return ImageLoader(data, processor, batch_size=size, dtype=first.dtype, pin_memory=device.type == "cuda", **options)

    loader = loader_of(
        images,
        shuffle=True,
        seed=seed,
        n_images=n_images,
        max_broken=max_broken,
        workers=workers,
        rank=world.rank,
        world=world.size,
        log=folder.path / "broken_images.jsonl" if folder is not None else None,
    )
    if loader.n_images is None:
        raise ImagesError("the images do not say how many they are: give n_images=..., the number that makes an epoch")
    settings: dict[str, Any] = {
        "preset": asdict(recipe) | {"options": dict(recipe.options), "tokens": asdict(tokens)},
        "hook_point": hook_point.to_dict(),
        "tower": hook_point.record(model).to_dict(),
        "data": {"fingerprint": loader.fingerprint, "n_images": loader.n_images, "processor": _hash(processor)},
        "image_batch_size": image_batch_size,
        "seed": seed,
        "autocast": _autocast(autocast, device),
        "processes": world.size,
        "dtype": str(first.dtype),
        "cache": cache is not None,  # its rows are rounded, and come in another order
    }
    if loader.kind in ("stream", "webdataset"):  # each worker has its part of a stream
        settings["data"]["workers"] = loader.workers
    if folder is not None and resume and folder.is_finished:
        folder.check(settings)
        return VisionSAE.load(folder.out)
    _same_everywhere(settings, world)
    checkpoint = _open(folder, settings, resume, world)
    with (
        _leaving_nothing(folder),
        _open_cache(cache, settings, world, device, tower) as disk,
        warnings.catch_warnings(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.inference_mode(False),  # whatever the caller has switched off
        torch.enable_grad(),
    ):
        warnings.filterwarnings("once", category=UnreadableImageWarning, append=True)  # and not in every epoch
        torch.manual_seed(seed)
        stream = RowStream(model, loader, hook_point, tokens, seed=seed, store=disk or MemoryStore(), world=world)
        plan = _load_plan(checkpoint)
        sae = build(recipe, hook_point.d_in)
        if plan is None:
            room = _KEPT_BYTES.get(device.type, 2 * 2**30) if keep_in_memory is None else keep_in_memory
            plan, center_d = _look(stream, recipe, hook_point.d_in, room // first.element_size())
            sae.b_dec.data.copy_(center_d)
        elif disk is not None and disk.order != plan.order:
            raise ResumeError(f"the cache {cache} was filled in the order {disk.order}, that of the training {plan.order}")
        if disk is None and not plan.in_memory:
            stream.store = None
        sae.to(device)
        trainer = _trainer(sae, recipe, plan, world, settings["autocast"])
        if compile_step:
            sae.training_forward_pass = torch.compile(sae.training_forward_pass)
        buffer = ShuffleBuffer(
            batch_size=recipe.batch_size,
            capacity=min(plan.n_rows, _BUFFER_BATCHES * recipe.batch_size),
            generator=torch.Generator().manual_seed(seed),
        )
        training = Training(
            trainer,
            Feed(stream, buffer, recipe.epochs, device),
            Schedule(plan.steps, checkpoint_every, log_every, recipe.resample_every),
            seed=seed,
            folder=folder,
            world=world,
            validation_nd=None
            if validation is None
            else _first_rows(RowStream(model, loader_of(validation), hook_point, tokens), _VALIDATION_ROWS),
        )
        training.plan = asdict(plan)
        if checkpoint is not None:
            training.load(checkpoint)
        read_before = stream.n_images
        where = folder.path if folder is not None and world.is_first else None
        journal = Journal(
            where,
            steps=plan.steps,
            done=trainer.n_training_steps,
            log_to=log_to if world.is_first else (),
            settings=settings,
            show=progress and world.is_first,
        )
        with journal:
            training.run(journal, lambda: stream.n_images - read_before)
        if trainer.n_training_steps == 0:
            raise ImagesError(
                f"{plan.n_rows} rows an epoch over {recipe.epochs} epochs make no batch of {recipe.batch_size}: "
                "give more images, or a smaller batch_size"
            )
        stream.position()  # a store keeps what was read, also where the steps ended before the data
        training.finish()
        settle_threshold(sae, lambda: plan.scale * _sample(stream)[0].to(device), recipe.batch_size)
        trained = VisionSAE(for_inference(sae, plan.scale), hook_point, tokens, tower=hook_point.record(model))
        trained.stats = feature_stats(trained.sae, _take((c.rows_nd.float() for c in stream.epoch(0)), _STATS_ROWS))
    trained.sae.cfg.metadata.hook_name = hook_point.path
    if folder is not None:
        if world.is_first:
            folder.finish(trained.save)
        world.wait()
    return trained


def _recipe(preset: str | Preset, changes: dict[str, Any]) -> Preset:
    if isinstance(preset, str) and preset not in PRESETS:
        raise PresetError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}. Or give a sauce_hooks.sae.Preset.")
    known = Preset.__dataclass_fields__
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise PresetError(f"train_sae has no option {', '.join(unknown)}, nor has Preset; a Preset's are {', '.join(known)}")
    return replace(PRESETS[preset] if isinstance(preset, str) else preset, **changes)


def _autocast(wanted: bool | None, device: torch.device) -> bool:
    return device.type == "cuda" if wanted is None else wanted


def _hash(processor: Any) -> str | None:
    """What a processor does to an image, in short."""
    prepare = getattr(processor, "image_processor", processor)
    if prepare is None:
        return None
    described = prepare.to_dict() if hasattr(prepare, "to_dict") else repr(type(prepare))
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _same_everywhere(settings: dict[str, Any], world: World) -> None:
    """Processes that were started together to compare settings, say, must not be taken for one training."""
    for rank, theirs in enumerate(world.objects(settings)):
        if differences := changes(theirs, settings):
            raise PresetError(
                f"processes that are started together train one SAE, but process {rank} has other settings than process "
                f"{world.rank}: {'; '.join(differences)}. Give all the same, or start each without torchrun or accelerate"
            )


def _open(folder: TrainingFolder | None, settings: dict[str, Any], resume: bool, world: World) -> Path | None:
    """The checkpoint to go on from; the first process alone writes."""
    if folder is None:
        return None
    with _together(world):
        if world.is_first:
            folder.open(settings, resume=resume)
    return folder.latest()


@contextmanager
def _together(world: World) -> Generator[None]:
    """What fails in one process fails in all, which would wait for it."""
    try:
        yield
    except Exception as problem:
        world.agree(problem)
        raise
    world.agree()


@contextmanager
def _leaving_nothing(folder: TrainingFolder | None) -> Generator[None]:
    """What fails before the first checkpoint leaves no folder that looks like a training."""
    if folder is None:
        yield
        return
    try:
        yield
    except BaseException:
        folder.abandon()
        raise
    finally:
        folder.close()


@contextmanager
def _open_cache(
    cache: str | Path | None, settings: dict[str, Any], world: World, device: torch.device, tower: nn.Module
) -> Generator[ActivationCache | SharedStore | None]:
    if cache is None:
        yield None
        return
    if any(type(module).__module__.startswith("peft.") for module in tower.modules()):
        raise ActivationCacheError(
            "activations of a tower with PEFT adapters are not kept on disk: the record of a tower does not know its "
            "adapters, so another one's could be taken for them. Merge them into the weights, or leave cache out."
        )
    data = settings["data"]
    tokens = settings["preset"]["tokens"]
    record = CacheRecord(
        hook_point=settings["hook_point"],
        tower=settings["tower"],
        tokens={"read": tokens["read"], "per_image": tokens["per_image"]}
        | ({} if tokens["per_image"] is None else {name: settings[name] for name in ("seed", "image_batch_size")}),
        data=data["fingerprint"],
        n_images=data["n_images"],
        processor=data["processor"],
        dtype=settings["dtype"],
        order={name: settings[name] for name in ("seed", "image_batch_size", "processes")},
    )
    store: ActivationCache | None = None
    with _together(world):
        if world.is_first:
            store = ActivationCache.open(cache, record)
    try:
        yield store if world.size == 1 else SharedStore(store, world, d_in=record.d_in, device=device)
    finally:
        if store is not None:
            store.close()


def _sample(stream: RowStream) -> tuple[Float[Tensor, "n d_in"], int]:
    """Rows of the first images of the first epoch, no image giving many; and how many rows the epoch will have."""
    taken: list[Tensor] = []
    n_rows = 0
    for chunk in stream.epoch(0):
        n_rows += len(chunk.rows_nd)
        n_images = int(chunk.images_n.unique().numel())
        taken.append(chunk.rows_nd[:: max(1, len(chunk.rows_nd) // (n_images * _SAMPLE_PER_IMAGE))].float())
        if sum(map(len, taken)) >= _SAMPLE_ROWS:
            n_rows = round(n_rows / len(taken) * (stream.loader.n_batches or 0))  # a chunk is a batch of images
            break
    stream.position()  # a store keeps what was read
    return torch.cat(taken), n_rows


def _look(stream: RowStream, recipe: Preset, d_in: int, room: int) -> tuple[_Plan, Float[Tensor, " d_in"]]:
    """The plan, with room for so many numbers in memory, and where the decoder bias starts."""
    sample, n_rows = _sample(stream)
    scale = d_in**0.5 / float(sample.norm(dim=1).mean()) if recipe.normalize else 1.0
    plan = _Plan(
        n_rows=n_rows,
        steps=n_rows * recipe.epochs // recipe.batch_size,
        order=None if stream.store is None or isinstance(stream.store, MemoryStore) else stream.store.order,
        in_memory=n_rows * d_in <= room and recipe.epochs > 1,
        scale=scale,
    )
    return plan, scale * center(sample, recipe.b_dec_init)


def _load_plan(checkpoint: Path | None) -> _Plan | None:
    if checkpoint is None:
        return None
    with reading(checkpoint):
        return _Plan(**torch.load(checkpoint / "state.pt", weights_only=True, map_location="cpu", mmap=True)["plan"])


def _trainer(sae: Any, recipe: Preset, plan: _Plan, world: World, autocast: bool) -> SAETrainer[Any, Any]:
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from sauce_hooks.sae.fast_l1 import use_fused_adam

    steps = max(1, plan.steps)
    own = check_divides(recipe.batch_size, world)
    config = SAETrainerConfig(
        total_training_samples=steps * own,
        train_batch_size_samples=own,
        lr=recipe.lr,
        lr_end=recipe.lr / 10,
        lr_warm_up_steps=min(recipe.lr_warm_up_steps, steps // 10),
        lr_decay_steps=int(recipe.lr_decay_share * steps),
        dead_feature_window=recipe.dead_after,
        device=str(sae.device),
        autocast=autocast,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))
    trainer.activation_scaler.scaling_factor = plan.scale
    use_fused_adam(trainer)
    return trainer


def _first_rows(stream: RowStream, n: int) -> Float[Tensor, "_ d_in"]:
    return torch.cat(list(_take((chunk.rows_nd.float() for chunk in stream.epoch(0)), n)))


def _take(chunks: Iterator[Float[Tensor, "_ d"]], n: int) -> Iterator[Float[Tensor, "_ d"]]:
    for chunk in chunks:
        yield chunk[:n]
        n -= len(chunk)
        if n <= 0:
            return
