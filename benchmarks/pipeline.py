"""How long the paper's training would take: each stage, the whole, what follows. See README.md, "The whole run"."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sauce_hooks import TokenPolicy, find_hook_point, train_sae
from sauce_hooks.activations import ImageLoader, ShuffleBuffer, read_batch

PAPER_IMAGES = 1_281_167
"""ImageNet's training images. The paper trains on them for two epochs, one token an image."""
GOAL_MINUTES = 40.0
TOWER = "tower up to the hooked block"
WHOLE: dict[str, dict[str, Any]] = {
    "activations kept on the device": {"keep_in_memory": 2**40},
    "activations kept on disk (2.6 GB)": {"keep_in_memory": 0, "cache": "cache"},
    "nothing kept": {"keep_in_memory": 0},
}
"""What `train_sae` is told; a cache is a folder in scratch space."""
BATCHES_A_WORKER = 8
"""Decoded in a round at least, so that its beginning and end, when not all workers are busy, count for little."""
progress = Console(stderr=True)


@dataclass(frozen=True)
class Sizes:
    """Of the tower, the SAE and the images."""

    width: int = 1024
    layers: int = 24
    heads: int = 16
    side: int = 336
    patch: int = 14
    expansion: int = 64
    rows: int = 1024
    """Of an optimiser step."""
    image_batch: int = 128
    photo: tuple[int, int] = (500, 375)
    """ImageNet's commonest size."""
    matrix: int = 8192
    """Side of the matrices that the device's peak is measured with."""


SMALL = Sizes(width=64, layers=4, heads=4, side=48, patch=8, expansion=2, rows=16, image_batch=8, photo=(60, 45), matrix=256)


def build_model(sizes: Sizes, device: str, dtype: torch.dtype) -> Any:
    """A LLaVA whose tower has these sizes, with random weights, and whose language model is as small as can be."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=sizes.width,
        intermediate_size=4 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        image_size=sizes.side,
        patch_size=sizes.patch,
    )
    text = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=4, vision_feature_layer=-2)
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration(config)
    return model.eval().to(dtype)


def build_processor(sizes: Sizes) -> Any:
    """CLIP's preprocessing on Pillow, as LLaVA-1.5 has it."""
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": sizes.side}, crop_size={"height": sizes.side, "width": sizes.side})


def draw_photo(number: int, folder: Path, size: tuple[int, int]) -> Path:
    """A JPEG with the content of a photo on many scales, about as large on disk as ImageNet's (110 kB on average)."""
    rng = np.random.default_rng(number)
    width, height = size
    picture = np.zeros((height, width, 3))
    for octave in range(7):
        cells = 2 ** (octave + 1)
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        picture += np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=float) * 0.62**octave
    picture += rng.normal(0, 9, picture.shape)
    picture = (picture - picture.min()) / np.ptp(picture) * 255
    path = folder / f"{number:06}.jpg"
    Image.fromarray(picture.astype(np.uint8)).save(path, quality=92)
    return path


class Clock:
    """Seconds of the wall, with the device's queue emptied at both ends."""

    def __init__(self, device: str) -> None:
        self.wait: Callable[[], None] = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def time(self, run: Callable[[], Any]) -> float:
        """Of one call."""
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def rate(self, run: Callable[[], int], rounds: int) -> list[float]:
        """How many a second of what the call says it did, a round each; after a call to warm up."""
        run()
        rates: list[float] = []
        for _ in range(rounds):
            done: list[int] = []
            seconds = self.time(lambda done=done: done.append(run()))
            rates.append(done[0] / seconds)
        return rates


def peak(sizes: Sizes, device: str, dtype: torch.dtype, clock: Clock) -> float:
    """The fastest that square matrices of the device's dtype are multiplied, in operations a second."""
    a, b = (torch.randn(sizes.matrix, sizes.matrix, device=device, dtype=dtype) for _ in range(2))
    return max(clock.rate(lambda: (torch.mm(a, b), 2 * sizes.matrix**3)[1], 10))


def tower_flops(model: Any, hook_point: Any, inputs: Any) -> float:
    """Operations an image up to the hooked block, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        read_batch(model, inputs, hook_point, tokens="last")
    return counter.get_total_flops() / len(inputs["pixel_values"])


def decode(paths: list[Path], processor: Any, sizes: Sizes, workers: int) -> int:
    """Decode and preprocess all of them, again and again until every worker has had its batches."""
    paths = paths * -(-BATCHES_A_WORKER * max(1, workers) * sizes.image_batch // len(paths))
    loader = ImageLoader(paths, processor, batch_size=sizes.image_batch, workers=workers)
    return sum(len(batch.indices) for batch in loader.epoch(0))


def whole(
    model: Any, paths: list[Path], processor: Any, sizes: Sizes, workers: int, autocast: bool, kept: dict[str, Any]
) -> Callable[[], None]:
    """One training of two epochs as a user starts it, up to the saved SAE."""

    def run() -> None:
        with tempfile.TemporaryDirectory() as scratch:
            options = kept | ({"cache": Path(scratch) / kept["cache"]} if "cache" in kept else {})
            train_sae(
                model,
                paths,
                processor=processor,
                preset="sauce",
                expansion=sizes.expansion,
                batch_size=sizes.rows,
                tokens=TokenPolicy(read="last", edit="patches"),
                out=Path(scratch) / "sae",
                workers=workers,
                image_batch_size=sizes.image_batch,
                checkpoint_every=10**9,
                autocast=autocast,
                progress=False,
                **options,
            )

    return run


def sae_rows(model: Any, sizes: Sizes, device: str, autocast: bool) -> Callable[[], int]:
    """A training step of the paper's SAE on rows that are there."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from sauce_hooks.sae.fast_l1 import use_fused_adam
    from sauce_hooks.sae.objective import SauceTrainingSAE, SauceTrainingSAEConfig

    d_sae = sizes.width * sizes.expansion
    sae = SauceTrainingSAE(SauceTrainingSAEConfig(d_in=sizes.width, d_sae=d_sae, l1_coefficient=8e-5)).to(device)
    config = SAETrainerConfig(
        total_training_samples=10**6 * sizes.rows,
        train_batch_size_samples=sizes.rows,
        lr_end=1e-5,
        device=device,
        autocast=autocast,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))
    use_fused_adam(trainer)
    rows = torch.randn(sizes.rows, sizes.width, device=device)

    def step() -> int:
        trainer.step(rows)
        trainer.n_training_steps += 1
        return sizes.rows

    return step


def buffer_rows(sizes: Sizes, device: str) -> int:
    """Rows through the shuffle buffer, in chunks of a batch of images."""
    capacity = 32 * sizes.rows
    buffer = ShuffleBuffer(batch_size=sizes.rows, capacity=capacity, generator=torch.Generator())
    chunk = torch.randn(sizes.image_batch, sizes.width, device=device)
    chunks = 2 * capacity // sizes.image_batch

    def batches() -> Iterator[Tensor]:
        for _ in range(chunks):
            yield from buffer.push(chunk)
        yield from buffer.flush()

    return sum(len(batch) for batch in batches())


def spread(values: list[float]) -> str:
    """A median and what the middle nine tenths lie between."""
    low, high = np.quantile(values, [0.05, 0.95])
    return f"{statistics.median(values):,.4g} [{low:,.4g}, {high:,.4g}]"


def main(
    images: Annotated[int, typer.Option(help="Different photos that are drawn.")] = 2_048,
    repeat: Annotated[int, typer.Option(help="How often each is in the data of the shorter whole run.")] = 16,
    workers: Annotated[int, typer.Option(help="Processes that decode.")] = max(1, (os.cpu_count() or 2) - 1),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    image_batch: Annotated[int, typer.Option(help="Images a forward of the tower.")] = 128,
    rounds: Annotated[int, typer.Option(help="How often each stage runs.")] = 5,
    small: Annotated[bool, typer.Option(help="A smoke run; its numbers mean nothing.")] = False,
    stages_only: Annotated[bool, typer.Option("--stages-only", help="Leave the whole run out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Every number, to standard output.")] = False,
    markdown: Annotated[bool, typer.Option(help="The tables as Markdown.")] = False,
) -> None:
    """Print the speed of every stage of a training, of the whole, and how long the paper's run would take so."""
    warnings.filterwarnings("ignore")
    started = time.perf_counter()
    sizes = SMALL if small else Sizes(image_batch=image_batch, matrix=8192 if device == "cuda" else 2048)
    images, repeat = (64, 1) if small else (images, repeat)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    clock = Clock(device)
    model, processor = build_model(sizes, device, dtype), build_processor(sizes)
    hook_point = find_hook_point(model)

    with tempfile.TemporaryDirectory() as scratch:
        with ProcessPoolExecutor(max(1, workers)) as pool:
            draw = partial(draw_photo, folder=Path(scratch), size=sizes.photo)
            paths = list(pool.map(draw, range(images), chunksize=16))
        kilobytes = statistics.mean(path.stat().st_size for path in paths) / 1000
        progress.print(f"{images} photos of {kilobytes:.0f} kB: {time.perf_counter() - started:.0f} s so far")

        some = [Image.open(path).convert("RGB") for path in paths[: sizes.image_batch]]
        inputs = processor(images=some, return_tensors="pt")
        on_host = {"pixel_values": inputs["pixel_values"].to(dtype)}
        inputs = {name: value.to(device) for name, value in on_host.items()}
        flops = tower_flops(model, hook_point, inputs)
        fastest = peak(sizes, device, dtype, clock)

        def tower(inputs: dict[str, Tensor]) -> int:
            read_batch(model, inputs, hook_point, tokens="last")
            return len(some)

        autocast = device == "cuda"
        rates = {
            f"decode and preprocess, {workers} processes": clock.rate(
                lambda: decode(paths, processor, sizes, workers), max(1, rounds // 2)
            ),
            TOWER: clock.rate(lambda: tower(inputs), rounds),
            "the same, and the pictures there from the host": clock.rate(lambda: tower(on_host), rounds),
            "shuffle buffer": clock.rate(lambda: buffer_rows(sizes, device), rounds),
            f"SAE step, {sizes.width * sizes.expansion:,} features": clock.rate(
                sae_rows(model, sizes, device, autocast), rounds
            ),
        }
        progress.print(f"stages: {time.perf_counter() - started:.0f} s so far")
        if not stages_only:  # what is loaded and compiled once is no part of the shorter run
            whole(model, paths, processor, sizes, workers, autocast, WHOLE["nothing kept"])()
        run = (
            {}
            if stages_only
            else {
                name: [
                    clock.time(whole(model, paths * times, processor, sizes, workers, autocast, kept))
                    for times in (repeat, 2 * repeat)
                ]
                for name, kept in WHOLE.items()
            }
        )
        progress.print(f"the whole: {time.perf_counter() - started:.0f} s so far")

    middle = {name: statistics.median(values) for name, values in rates.items()}
    share = middle[TOWER] * flops / fastest
    n = images * repeat
    # What n images more take is the speed; what is left of the shorter run is the start and the end.
    rates_of = {how: n / max(longer - shorter, 1e-9) for how, (shorter, longer) in run.items()}
    minutes = {how: (PAPER_IMAGES / rates_of[how] + 2 * run[how][0] - run[how][1]) / 60 for how in run}
    slowest = min(list(middle.values())[:3])
    ideal = PAPER_IMAGES * (1 / slowest + 2 / list(middle.values())[-1]) / 60
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    setting = (
        f"{name}, {torch.get_num_threads()} thread(s), {os.cpu_count()} cores, {workers} processes decoding; torch "
        f"{torch.__version__}; {str(dtype).removeprefix('torch.')}; tower {sizes.layers} × {sizes.width}, {sizes.side} "
        f"pixels, {flops / 1e9:.4g} GFLOP an image up to block {hook_point.layer + 1}; JPEGs of "
        f"{sizes.photo[0]}×{sizes.photo[1]}, {kilobytes:.0f} kB; image batch {sizes.image_batch}, {sizes.rows} rows a step"
    )
    tables = [
        Table(
            "Each stage alone: images (or rows, one an image) a second, median [5%, 95%]",
            ["stage", "a second"],
            [[stage, spread(values)] for stage, values in rates.items()]
            + [
                ["the tower's arithmetic, TFLOP/s", f"{middle[TOWER] * flops / 1e12:.4g}"],
                [f"the device's peak ({sizes.matrix}³ matrix product), TFLOP/s", f"{fastest / 1e12:.4g}"],
                ["share of the peak", f"{share:.1%}"],
            ],
        ),
        Table(
            f"The whole: `train_sae`, two epochs; the paper's run: {PAPER_IMAGES:,} images, one token an image",
            ["how", f"{n:,} images, s", f"{2 * n:,} images, s", "images/s", "paper's run, minutes", "goal ≤ 40 on one H200"],
            [
                [
                    how,
                    *(f"{seconds:.4g}" for seconds in run[how]),
                    f"{rates_of[how]:,.4g}",
                    f"{minutes[how]:,.4g}",
                    ("yes" if minutes[how] <= GOAL_MINUTES else "no") if device == "cuda" else "no GPU",
                ]
                for how in run
            ]
            + [
                [
                    "from the stages: one pass at the slowest of the first three, SAE steps after it",
                    "",
                    "",
                    "",
                    f"{ideal:,.4g}",
                    "",
                ]
            ],
        ),
    ]
    if as_json:
        numbers = {"setting": setting, "sizes": asdict(sizes), "rates": rates, "whole": run, "flops": flops, "peak": fastest}
        json.dump({**numbers, "share": share, "minutes": minutes}, sys.stdout, indent=1)
        print()
    elif markdown:
        print(f"> {setting}\n\n" + "\n".join(table.markdown() for table in tables))
    else:
        console = Console(width=None if sys.stdout.isatty() else 140)
        console.print(setting, *(table.rich() for table in tables), sep="\n\n")
    progress.print(f"done in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    typer.run(main)
