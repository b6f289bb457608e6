"""What an L1 step costs in this library and in other public SAE trainers, as ratios within one run. See README.md."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from itertools import count
from typing import Annotated, Any

import jaxtyping
import torch
import typer
from rich.console import Console
from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from table import Table
from torch import Tensor
from training import THRESHOLDS, Estimate, interleaved, median, progress

from sauce_hooks.sae.fast_l1 import use_fused_adam
from sauce_hooks.sae.objective import SauceTrainingSAE, SauceTrainingSAEConfig

OURS, BASE, CONTROL = "ours", "SAE-Lens", "SAE-Lens, built once more (control)"


class Device(StrEnum):
    """Where the steps run."""

    CPU = "cpu"
    CUDA = "cuda"


class Precision(StrEnum):
    """Of the products. bf16 is autocast: weights, gradients and Adam's state stay in float32."""

    FLOAT32 = "float32"
    TF32 = "tf32"
    BF16 = "bf16"


@dataclass(frozen=True)
class Setting:
    """What every trainer is given."""

    device: Device = Device.CPU
    precision: Precision = Precision.FLOAT32
    compiled: bool = False
    d_in: int = 1024
    d_sae: int = 16_384
    batch: int = 1024
    alpha: float = 8e-5
    """The weight of Σ z beside Σ e², as in the preset `sauce`."""
    lr: float = 1e-5
    """So low that about as many features stay active, so high that a few steps are seen in the reconstructions."""

    def autocast(self) -> Any:
        """Around what a trainer does not put under autocast by itself."""
        if self.precision is Precision.BF16:
            return torch.autocast(self.device, torch.bfloat16)
        return nullcontext()


@dataclass(frozen=True)
class Weights:
    """Views of an SAE's weights: all start from the same ones, and all are judged by the same forward pass."""

    W_enc_dD: Tensor
    b_enc_D: Tensor
    W_dec_Dd: Tensor
    b_dec_d: Tensor

    @classmethod
    def at_start(cls, setting: Setting, threshold: float, rows_Bd: Tensor) -> Weights:
        """Unit-norm decoder rows, their transpose as the encoder, scaled so that these rows come back as well as can be."""
        generator = torch.Generator().manual_seed(0)
        W_dec_Dd = torch.nn.functional.normalize(torch.randn(setting.d_sae, setting.d_in, generator=generator))
        weights = cls(W_dec_Dd.T.clone(), torch.full((setting.d_sae,), -threshold), W_dec_Dd, torch.zeros(setting.d_in))
        x_hat_Bd, _ = weights.forward(rows_Bd)
        scale = (x_hat_Bd * rows_Bd).sum() / x_hat_Bd.square().sum()
        return cls(weights.W_enc_dD * scale, weights.b_enc_D * scale, W_dec_Dd, weights.b_dec_d)

    def forward(self, x_Bd: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions and features."""
        z_BD = torch.relu((x_Bd - self.b_dec_d) @ self.W_enc_dD + self.b_enc_D)
        return z_BD @ self.W_dec_Dd + self.b_dec_d, z_BD

    @torch.no_grad()
    def copy_(self, other: Weights) -> None:
        """Take the other's values."""
        for name in self.__dataclass_fields__:
            getattr(self, name).copy_(getattr(other, name))

    @torch.no_grad()
    def quality(self, x_Bd: Tensor) -> dict[str, float]:
        """On these rows: the explained variance and how many features are active a row."""
        x_hat_Bd, z_BD = self.forward(x_Bd.to(self.W_dec_Dd.device))
        x_Bd = x_Bd.to(x_hat_Bd.device)
        left = (x_Bd - x_hat_Bd).square().sum() / (x_Bd - x_Bd.mean(0)).square().sum()
        return {"explained": 1 - float(left), "active": float(z_BD.count_nonzero()) / len(x_Bd)}


@dataclass(frozen=True)
class Trainer:
    """A trainer at work."""

    weights: Callable[[], Weights]
    """Asked anew each time, since a package may put another tensor in a parameter's place."""
    train: Callable[[Sequence[Tensor]], object]
    """A step on each of these batches."""


# How each is built. What a package does in a step of its own training loop is done here, its logging switched off.


def sae_lens(sae: Any, setting: Setting) -> Trainer:
    """SAE-Lens's trainer, for its own class and for ours, with fused Adam."""
    if setting.compiled:
        sae.training_forward_pass = torch.compile(sae.training_forward_pass)  # as SAE-Lens's runner does
    config = SAETrainerConfig(
        total_training_samples=10**6 * setting.batch,
        train_batch_size_samples=setting.batch,
        lr=setting.lr,
        lr_end=setting.lr / 10,
        lr_warm_up_steps=0,
        lr_decay_steps=0,
        device=setting.device.value,
        autocast=setting.precision is Precision.BF16,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))
    use_fused_adam(trainer)

    def train(batches: Sequence[Tensor]) -> None:
        for batch in batches:
            trainer.step(batch)

    return Trainer(lambda: Weights(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), train)


def sae_lens_config(config_class: Any, setting: Setting) -> Any:
    """Of an SAE of these sizes."""
    return config_class(d_in=setting.d_in, d_sae=setting.d_sae, l1_coefficient=setting.alpha, device=setting.device.value)


def theirs(setting: Setting) -> Trainer:
    """SAE-Lens's L1 SAE."""
    return sae_lens(StandardTrainingSAE(sae_lens_config(StandardTrainingSAEConfig, setting)), setting)


def ours(setting: Setting) -> Trainer:
    """The preset `sauce`'s."""
    return sae_lens(SauceTrainingSAE(sae_lens_config(SauceTrainingSAEConfig, setting)), setting)


def dictionary_learning(setting: Setting, trainer_class: str) -> Trainer:
    """As in `dictionary_learning.training.trainSAE`, which puts the whole update under autocast, its rows cast before."""
    module = importlib.import_module("dictionary_learning.trainers.standard")
    trainer = getattr(module, trainer_class)(
        steps=10**6,
        activation_dim=setting.d_in,
        dict_size=setting.d_sae,
        layer=0,
        lm_name="none",
        lr=setting.lr,
        l1_penalty=setting.alpha,
        warmup_steps=0,
        sparsity_warmup_steps=None,
        device=setting.device.value,
    )
    use_fused_adam(trainer)  # it has SAE-Lens's shape: an Adam named `optimizer`
    sae, numbers = trainer.ae, count()
    if setting.compiled:
        sae.compile()
    dtype = torch.bfloat16 if setting.precision is Precision.BF16 else torch.float32

    def train(batches: Sequence[Tensor]) -> None:
        for batch in batches:
            with setting.autocast():
                trainer.update(next(numbers), batch.to(dtype))

    return Trainer(lambda: Weights(sae.encoder.weight.T, sae.encoder.bias, sae.decoder.weight.T, sae.bias), train)


def saev(setting: Setting) -> Trainer:
    """The body of the loop in `saev.training.train`, which itself reads its rows from shards that its own tools wrote."""
    from saev import config, nn

    expansion, rest = divmod(setting.d_sae, setting.d_in)
    assert rest == 0
    # Its squared error is a mean over d too.
    sae = nn.SparseAutoencoder(
        config.SparseAutoencoder(d_vit=setting.d_in, exp_factor=expansion, sparsity_coeff=setting.alpha / setting.d_in)
    ).to(setting.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=setting.lr, fused=True)
    if setting.compiled:
        sae.compile()

    def train(batches: Sequence[Tensor]) -> None:
        for batch in batches:
            sae.normalize_w_dec()
            with setting.autocast():
                _, _, losses = sae(batch)
            losses.loss.backward()
            sae.remove_parallel_grads()
            optimizer.step()
            optimizer.zero_grad()

    return Trainer(lambda: Weights(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), train)


def overcomplete(setting: Setting) -> Trainer:
    """`overcomplete.sae.train.train_sae`, or `train_sae_amp`, as they are, over these batches as one epoch."""
    from overcomplete.sae import SAE, mse_l1
    from overcomplete.sae import train as loops

    sae = SAE(setting.d_in, setting.d_sae, device=setting.device.value)
    optimizer = torch.optim.Adam(sae.parameters(), lr=setting.lr, fused=True)
    if setting.compiled:
        sae.compile()
    # Its squared error is a mean over rows and d, its penalty a sum over both.
    criterion = partial(mse_l1, penalty=setting.alpha / (setting.d_in * setting.batch))
    loop = loops.train_sae_amp if setting.precision is Precision.BF16 else loops.train_sae

    def train(batches: Sequence[Tensor]) -> None:
        loop(sae, batches, criterion, optimizer, nb_epochs=1, monitoring=0, device=setting.device.value)

    linear, b_dec = sae.encoder.final_block[0], torch.zeros(setting.d_in, device=setting.device)
    return Trainer(lambda: Weights(linear.weight.T, linear.bias, sae.dictionary._weights, b_dec), train)


@dataclass(frozen=True)
class Contender:
    """A trainer that may be there."""

    build: Callable[[Setting], Trainer]
    package: str
    """On PyPI."""
    needs: tuple[str, ...]
    """Modules to import, to see whether it is there."""
    in_step: str
    """What it does in a step besides loss, gradients and Adam."""
    install: str = ""


CONTENDERS = {
    OURS: Contender(ours, "sauce-hooks", (), "unit-norm decoder rows, clipping, dead-feature counts"),
    BASE: Contender(theirs, "sae-lens", (), "clipping, dead-feature counts"),
    CONTROL: Contender(theirs, "sae-lens", (), "the same"),
    # Before dictionary-learning: beartype cannot be imported once nnsight has put its own methods on `object`.
    "saev": Contender(
        saev,
        "saev",
        ("saev.nn",),
        "unit-norm decoder rows, projected decoder gradient, L0; without dead-feature counts and clipping",
        "pip install --no-deps saev==0.1.0 && pip install beartype einops",
    ),
    "dictionary-learning, April update": Contender(
        partial(dictionary_learning, trainer_class="StandardTrainerAprilUpdate"),
        "dictionary-learning",
        ("dictionary_learning.trainers.standard",),
        "clipping; without dead-feature counts",
        "pip install --no-deps dictionary-learning==0.1.0 && pip install einops tqdm",
    ),
    "dictionary-learning, standard": Contender(
        partial(dictionary_learning, trainer_class="StandardTrainer"),
        "dictionary-learning",
        ("dictionary_learning.trainers.standard",),
        "unit-norm decoder rows, projected decoder gradient; without dead-feature counts and clipping",
        "pip install --no-deps dictionary-learning==0.1.0 && pip install einops tqdm",
    ),
    "overcomplete": Contender(
        overcomplete,
        "overcomplete",
        ("overcomplete.sae",),
        "unit-norm decoder rows (twice), clipping, dead-feature flags; without a decoder bias",
        "pip install --no-deps overcomplete==0.3.0 && "
        'pip install torchvision opencv-python-headless scikit-image scikit-learn "matplotlib<3.9" einops',
    ),
}


def leave_out(name: str, error: Exception, advice: str = "") -> None:
    """Say so; the others still run."""
    progress.print(f"{name} is left out ({type(error).__name__}: {error}).{advice}", markup=False, soft_wrap=True)


def that_import() -> dict[str, Contender]:
    """Those that can be imported here, with a line for each of the others."""
    found = {}
    for name, contender in CONTENDERS.items():
        try:
            for module in contender.needs:
                importlib.import_module(module)
        except Exception as error:  # whatever a package does wrong while it is imported
            leave_out(name, error, f" To have it: {contender.install}")
        else:
            found[name] = contender
    return found


# Timing


def now(device: Device) -> float:
    """Seconds of processor time; on a GPU, of wall time once all that was queued is done."""
    if device is Device.CPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def race(
    contenders: dict[str, Contender], setting: Setting, threshold: float, rounds: int, steps: int, warm_up: int
) -> dict[str, Any]:
    """Each trainer's seconds a step in every round, and what it made of rows that none has seen, before and after."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(1 + warm_up + rounds * steps, setting.batch, setting.d_in, generator=generator)
    unseen, batches = rows[0], list(rows[1:].to(setting.device))

    start = Weights.at_start(setting, threshold, unseen)
    trainers: dict[str, Trainer] = {}
    for name, contender in contenders.items():
        try:
            trainer = contender.build(setting)
            trainer.weights().copy_(start)
            trainer.train(batches[:warm_up])  # Adam's state, compilation, the choice of kernels
        except Exception as error:  # not every package can be compiled, or cast
            leave_out(name, error)
        else:
            trainers[name] = trainer

    seconds: dict[str, list[float]] = {name: [] for name in trainers}

    def turn(name: str, number: int) -> None:
        first = warm_up + number * steps
        began = now(setting.device)
        trainers[name].train(batches[first : first + steps])
        seconds[name].append((now(setting.device) - began) / steps)

    interleaved(tuple(trainers), turn, rounds)
    return {
        "seconds": seconds,
        "before": start.quality(unseen),
        "after": {name: trainer.weights().quality(unseen) for name, trainer in trainers.items()},
    }


def tables(contenders: dict[str, Contender], results: dict[str, dict[str, Any]]) -> list[Table]:
    """Speed, what was learned, and what each does in a step."""

    def ratio(seconds: dict[str, list[float]], name: str) -> str:
        if name == CONTROL:
            return f"{Estimate.of_ratio(seconds[CONTROL], seconds[BASE])} of SAE-Lens to itself"
        return str(Estimate.of_ratio(seconds[name], seconds[OURS]))

    def speed(name: str) -> list[str]:
        cells = []
        for result in results.values():
            seconds = result["seconds"]
            cells += ["1" if name == OURS else ratio(seconds, name), f"{median(seconds[name]):.3g}"]
        return cells

    def learned(qualities: Iterable[dict[str, float]]) -> list[str]:
        return [cell for quality in qualities for cell in (f"{quality['explained']:.4f}", f"{quality['active']:.0f}")]

    return [
        Table(
            "How many times as fast as this trainer ours is, median over the rounds [95%], and seconds a step",
            ["trainer", *(cell for regime in results for cell in (regime, "seconds"))],
            [[name, *speed(name)] for name in contenders],
        ),
        Table(
            "After these steps, on rows that none has seen: explained variance, features active a row",
            ["trainer", *(cell for regime in results for cell in (regime, "active"))],
            [
                ["at the start, all", *learned(result["before"] for result in results.values())],
                *([name, *learned(result["after"][name] for result in results.values())] for name in contenders),
            ],
        ),
        Table(
            "In a step besides loss, gradients and Adam",
            ["trainer", "version", "besides"],
            [
                [name, importlib.metadata.version(contender.package), contender.in_step]
                for name, contender in contenders.items()
            ],
        ),
    ]


def main(
    rounds: Annotated[int, typer.Option(help="How often each trainer has its turn.")] = 6,
    steps: Annotated[int, typer.Option(help="Steps a turn; more on a GPU, where one is too short to time.")] = 1,
    warm_up: Annotated[int, typer.Option(help="Steps of each before its first turn.")] = 1,
    device: Annotated[Device, typer.Option(help="On cuda, wall time between synchronisations.")] = Device.CPU,
    precision: Annotated[Precision, typer.Option(help="Of the products; tf32 is for cuda.")] = Precision.FLOAT32,
    compiled: Annotated[bool, typer.Option(help="Every trainer's forward pass through torch.compile.")] = False,
    small: Annotated[bool, typer.Option(help="A smoke run; its ratios mean nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Every number, to standard output.")] = False,
    markdown: Annotated[bool, typer.Option(help="The tables as Markdown.")] = False,
) -> None:
    """Print how an L1 training step compares with other public trainers' on the same rows, from the same weights."""
    started = time.perf_counter()
    warnings.filterwarnings("ignore")
    jaxtyping.config.update("jaxtyping_disable", compiled)  # saev checks shapes as it runs, which cannot be compiled
    torch.set_float32_matmul_precision("high" if precision is Precision.TF32 else "highest")
    torch.set_autocast_dtype(device, torch.bfloat16)  # overcomplete takes the device's default
    sizes = {"d_in": 32, "d_sae": 256, "batch": 64} if small else {}
    setting = Setting(device=device, precision=precision, compiled=compiled, **sizes)
    contenders = that_import()

    results: dict[str, dict[str, Any]] = {}
    for regime, threshold in THRESHOLDS.items():
        results[regime] = race(contenders, setting, threshold, rounds, steps, warm_up)
        contenders = {name: contenders[name] for name in results[regime]["seconds"]}
        progress.print(f"{regime}: {time.perf_counter() - started:.0f} s so far")

    where = (
        f"CPU, {torch.get_num_threads()} thread(s), processor time"
        if device is Device.CPU
        else f"{torch.cuda.get_device_name()}, wall time"
    )
    described = (
        f"{where}; torch {torch.__version__}; {precision}{', compiled' if compiled else ''}; d = {setting.d_in}, "
        f"D = {setting.d_sae}, batch {setting.batch}; {warm_up} + {rounds} × {steps} steps of each"
    )
    made = tables(contenders, results)
    if as_json:
        versions = {name: importlib.metadata.version(contender.package) for name, contender in contenders.items()}
        report = {"setting": described, "sizes": asdict(setting), "versions": versions, "results": results}
        json.dump(report, sys.stdout, indent=1)
        print()
    elif markdown:
        print(described + "\n\n" + "\n".join(table.markdown() for table in made))
    else:
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(described, *(table.rich() for table in made), sep="\n\n")
    progress.print(f"done in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    typer.run(main)
