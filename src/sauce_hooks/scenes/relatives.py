"""Train the bundled model's relatives, which transfer is measured on. Run by the project, not by its users.

    python -m sauce_hooks.scenes.relatives larger --out runs/scenes     # where scenes.training left its pool; resumes
    python -m sauce_hooks.scenes.relatives finer --out runs/scenes

"larger" has the bundled model's very tower and a larger language model, trained from nothing: it is to the bundled model
what LLaVA-1.5-13B is to 7B. "finer" reads four times the pixels, and its tower and all behind it were trained on for them:
what LLaVA-1.6 is to 1.5.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch.nn import functional as F

from sauce_hooks.scenes.bundled import Relative, asset, competence, load_model
from sauce_hooks.scenes.training import Recipe, build_model, build_processor, draw_pool, save, train_reader, train_tower

LARGER = replace(Recipe(), lm_width=160, lm_layers=5, lm_steps=2_300)
"""1.9 times the parameters behind the tower, as in the paper's pair."""
FINER = replace(
    Recipe(), pixels=96, pool=12_000, tower_steps=300, tower_batch=32, tower_lr=5e-4, lm_steps=400, lm_batch=20, lm_lr=1e-3
)
"""Everything starts as the bundled model has it, the tower's positions interpolated, and is trained on."""
COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
_POSITIONS = "embeddings.position_embedding.weight"


def train_larger(out: Path) -> Any:
    """The bundled tower under a larger language model."""
    folder = out / "larger"
    folder.mkdir(parents=True, exist_ok=True)
    if not (tokens := folder / "tokens.pt").exists() and (shared := out / "tokens.pt").exists():
        tokens.symlink_to(shared.resolve())  # the same tower sees the same
    bundled, _ = load_model()
    processor = build_processor()
    model = build_model(LARGER, len(processor.tokenizer))
    model.model.vision_tower.load_state_dict(bundled.model.vision_tower.state_dict())
    with Progress(*COLUMNS) as progress:
        train_reader(LARGER, model, processor, out / "pool", folder, progress)
    save(model, processor, LARGER, folder / "model")
    return competence(model, processor, split="val")


def train_finer(out: Path) -> Any:
    """The bundled model trained on at twice the resolution."""
    folder = out / "finer"
    folder.mkdir(parents=True, exist_ok=True)
    bundled, _ = load_model()
    processor = build_processor(FINER.pixels)
    model = build_model(FINER, len(processor.tokenizer))
    state = {name: tensor.clone() for name, tensor in bundled.state_dict().items()}
    (positions,) = (name for name in state if name.endswith(_POSITIONS))
    state[positions] = _interpolated(state[positions], FINER.side)
    model.load_state_dict(state)
    heads = torch.load(out / "tower.pt", weights_only=True)["module"]
    with Progress(*COLUMNS) as progress:
        draw_pool(FINER, folder / "pool", progress)
        train_tower(
            FINER, model, folder / "pool", folder, progress, {name: heads[f"heads.{name}"] for name in ("weight", "bias")}
        )
        train_reader(FINER, model, processor, folder / "pool", folder, progress)
    save(model, processor, FINER, folder / "model")
    return competence(model, processor, split="val")


def _interpolated(positions_pd: torch.Tensor, side: int) -> torch.Tensor:
    """The class token's stays; those of the patches are stretched to a finer grid."""
    patches = positions_pd[1:]
    was = round(len(patches) ** 0.5)
    grid = patches.reshape(1, was, was, -1).permute(0, 3, 1, 2)
    finer = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions_pd[:1], finer.permute(0, 2, 3, 1).reshape(side * side, -1)])


def install(name: Relative, out: Path) -> None:
    """Put a trained relative among the package's assets: what it does not share with the bundled one, in half precision."""
    source, target = out / name / "model", asset(name)
    target.mkdir(parents=True, exist_ok=True)
    bundled, _ = load_model()
    known = bundled.state_dict()
    model, _ = load_model(source)
    own = {
        key: tensor.half()
        for key, tensor in model.state_dict().items()
        if key not in known or known[key].shape != tensor.shape or not torch.equal(known[key], tensor)
    }
    save_file({key: tensor.contiguous().clone() for key, tensor in own.items()}, target / "own.safetensors")
    for file in source.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            shutil.copy(file, target / file.name)
    for file in target.iterdir():
        file.chmod(0o644)  # safetensors' are for their owner alone


TRAIN = {"larger": train_larger, "finer": train_finer}


def main(
    relative: Annotated[Relative, typer.Argument(help="Which.")],
    out: Annotated[Path, typer.Option(help="The folder of checkpoints.")] = Path("runs/scenes"),
    installed: Annotated[bool, typer.Option("--install", help="Put the result into the package's assets.")] = False,
) -> None:
    """Train one of the relatives; run again with the same folder to go on after an interruption."""
    print(TRAIN[relative](out))
    if installed:
        install(relative, out)


if __name__ == "__main__":
    typer.run(main)
