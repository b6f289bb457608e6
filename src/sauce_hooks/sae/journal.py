"""What a training says while it runs: a bar, a line of JSON every so many steps, and other people's dashboards."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from sauce_hooks.bank import write_text_atomically
from sauce_hooks.errors import PresetError
from sauce_hooks.sae.progress import progress_bar

TRACKERS = ("tensorboard", "wandb")
"""Dashboards that metrics can also go to; through accelerate, which knows how to talk to them."""
_BAR = {
    "images/s": "{:.0f}",
    "rows/s": "{:.0f}",
    "loss": "{:.4g}",
    "l0": "{:.1f}",
    "explained_variance": "{:.3f}",
    "dead_share": "{:.1%}",
}
_SHORT = {"explained_variance": "EV", "dead_share": "dead", "l0": "L0"}


class Journal:
    """Takes the metrics of a training, in order of their steps."""

    def __init__(
        self,
        folder: Path | None,
        *,
        steps: int,
        done: int,
        log_to: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        show: bool = True,
    ) -> None:
        """Open a journal.

        Args:
            folder: where `metrics.jsonl` goes; None: nowhere.
            steps: steps of the whole training.
            done: steps made before this; later lines of an earlier run are dropped.
            log_to: names in `TRACKERS`.
            settings: what the dashboards shall know of the training.
            show: whether to draw a bar.
        """
        self._bar = progress_bar(steps, "train SAE", "step", show=show, done=done)
        self._file = folder / "metrics.jsonl" if folder is not None else None
        if self._file is not None:
            write_text_atomically(self._file, "".join(_lines_until(self._file, done)))
        self._trackers = [_tracker(name, folder) for name in log_to]
        for tracker in self._trackers:
            tracker.store_init_configuration(_flat(settings or {}))
        self._since = (time.perf_counter(), 0, 0)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        for tracker in self._trackers:
            tracker.finish()

    def step(self) -> None:
        """One step is made; reads nothing from the device."""
        self._bar.update()

    def write(self, step: int, metrics: Mapping[str, float], *, n_rows: int, n_images: int) -> None:
        """Put down the metrics of a step.

        Args:
            step: steps made.
            metrics: by name.
            n_rows: rows trained on since this journal was opened.
            n_images: images read since this journal was opened.
        """
        now = time.perf_counter()
        then, rows, images = self._since
        self._since = (now, n_rows, n_images)
        seconds = max(now - then, 1e-9)
        metrics = {**metrics, "rows/s": (n_rows - rows) / seconds, "images/s": (n_images - images) / seconds}
        shown = {_SHORT.get(k, k): form.format(metrics[k]) for k, form in _BAR.items() if k in metrics}
        self._bar.set_postfix(shown, refresh=False)
        if self._file is not None:
            with self._file.open("a") as file:
                known = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
                file.write(json.dumps({"step": step, **known}) + "\n")
        for tracker in self._trackers:
            tracker.log(dict(metrics), step=step)


def _lines_until(file: Path, step: int) -> list[str]:
    """The lines of a training that is gone on with; a line that a kill cut off is none."""
    kept: list[str] = []
    if step and file.exists():
        for line in file.read_text().splitlines(keepends=True):
            try:
                if cast(dict[str, Any], json.loads(line))["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):
                continue
    return kept


def check_trackers(log_to: Sequence[str]) -> None:
    """`PresetError` if a dashboard is unknown or not installed."""
    from accelerate.utils import is_tensorboard_available, is_wandb_available

    for name in log_to:
        if name not in TRACKERS:
            raise PresetError(f"unknown dashboard {name!r} in log_to; known: {', '.join(TRACKERS)}")
        if not {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}[name]():
            raise PresetError(f"log_to={name!r} needs a package that is not installed: pip install {name}")


def _tracker(name: str, folder: Path | None) -> Any:
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    where = folder or Path("sauce_hooks_training")
    if name == "tensorboard":
        tracker: Any = TensorBoardTracker("tensorboard", logging_dir=where)
    else:
        where.mkdir(parents=True, exist_ok=True)
        tracker = WandBTracker("sauce_hooks", dir=where)
    tracker.start()
    return tracker


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(_flat(cast(Mapping[str, Any], value), f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str | int | float | bool) else str(value)
    return flat
