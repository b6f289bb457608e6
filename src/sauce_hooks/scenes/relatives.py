"""Train the bundled model's relatives, which transfer is measured on. Run by the project, not by its users.

    python -m sauce_hooks.scenes.relatives --out runs/scenes          # where scenes.training left its pool; resumes

"larger" has the bundled model's very tower and a larger language model, trained from nothing: to the bundled model as
LLaVA-1.5-13B is to 7B.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sauce_hooks.scenes.bundled import competence, load_model
from sauce_hooks.scenes.training import Recipe, build_model, build_processor, save, train_reader

LARGER = replace(Recipe(), lm_width=160, lm_layers=5, lm_steps=2_000)
"""1.9 times the parameters behind the tower; the paper's pair has 1.9 times."""
COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())


def train_larger(out: Path) -> None:
    """The bundled tower under a larger language model."""
    folder = out / "larger"
    folder.mkdir(parents=True, exist_ok=True)
    if not (tokens := folder / "tokens.pt").exists() and (shared := out / "tokens.pt").exists():
        tokens.symlink_to(shared.resolve())  # the same tower sees the same
    bundled, _ = load_model()
    processor = build_processor()
    torch.manual_seed(LARGER.seed)
    model = build_model(LARGER, len(processor.tokenizer))
    model.model.vision_tower.load_state_dict(bundled.model.vision_tower.state_dict())
    with Progress(*COLUMNS) as progress:
        train_reader(LARGER, model, processor, out / "pool", folder, progress)
    save(model, processor, LARGER, folder / "model")
    print(competence(model, processor, split="val"))


def main(out: Path = Path("runs/scenes")) -> None:
    """Train the relatives; run again with the same folder to go on after an interruption."""
    train_larger(out)


if __name__ == "__main__":
    typer.run(main)
