"""The training loop around SAE-Lens's step: checkpoints, metrics, dead features, and a clean end.

SAE-Lens's own `fit()` ends with StopIteration on finite data, evaluates only with wandb on, and on resuming restores neither
data nor random states. So the loop is here, and every step in it is SAE-Lens's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sauce_hooks.activations import World
from sauce_hooks.errors import DivergedError
from sauce_hooks.sae.checkpoint import TrainingFolder, reading
from sauce_hooks.sae.feed import Feed
from sauce_hooks.sae.interruption import Interruption
from sauce_hooks.sae.journal import Journal
from sauce_hooks.sae.parallel import joined

if TYPE_CHECKING:
    from sae_lens import TrainingSAE
    from sae_lens.training.sae_trainer import SAETrainer

_log = logging.getLogger("sauce_hooks")
_METRICS = {
    "losses/overall_loss": "loss",
    "metrics/explained_variance": "explained_variance",
    "metrics/l0": "l0",
    "details/current_learning_rate": "lr",
}
"""SAE-Lens's names of what everybody looks at, and ours; its other losses and metrics keep theirs."""
_LEFT_OUT = ("explained_variance_legacy", "sparsity/", "details/")


@dataclass(frozen=True)
class Schedule:
    """How long, and how often what."""

    steps: int
    checkpoint_every: int
    log_every: int
    resample_every: int


class Training:
    """An SAE in training: SAE-Lens's trainer, what feeds it, and all that decides how it goes on."""

    def __init__(
        self,
        trainer: SAETrainer[Any, Any],
        feed: Feed,
        schedule: Schedule,
        *,
        seed: int,
        folder: TrainingFolder | None,
        world: World,
        validation_nd: Float[Tensor, "n d_in"] | None = None,
    ) -> None:
        self.trainer, self.feed, self.schedule = trainer, feed, schedule
        self._folder, self._world, self._validation_nd = folder, world, validation_nd
        self._resampling = torch.Generator().manual_seed(seed)
        self._device = torch.device(trainer.cfg.device)
        self._first_bad = torch.full((), -1, dtype=torch.long, device=self._device)

    @property
    def sae(self) -> TrainingSAE[Any]:
        """The SAE that is trained."""
        return self.trainer.sae

    def run(self, journal: Journal, n_images: Callable[[], int]) -> None:
        """Every step that is left.

        Raises:
            DivergedError: a loss is NaN or infinite.
            KeyboardInterrupt, SystemExit: on SIGINT and SIGTERM, after a checkpoint.
        """
        trainer, schedule = self.trainer, self.schedule
        began = trainer.n_training_steps
        output: Any = None
        with Interruption(enabled=self._folder is not None) as interruption, joined(self.sae, self._world):
            for batch_bd in self.feed:
                if trainer.n_training_steps >= schedule.steps:
                    break
                interruption.hold()  # until now there was nothing to save
                output = self._step(batch_bd)
                step = trainer.n_training_steps
                journal.step()
                if step % schedule.log_every == 0 or step == schedule.steps:
                    rows = (step - began) * len(batch_bd)
                    journal.write(step, self._metrics(output), n_rows=rows, n_images=n_images())
                if step % self._agree_every == 0 and self._stopped(interruption):
                    break
                if step % schedule.checkpoint_every == 0:
                    self.save()
            if output is not None:
                self.save()
            if self._stopped(interruption):
                step = trainer.n_training_steps
                _log.warning("interrupted: step %d of %d is saved, resume=True goes on", step, schedule.steps)
                interruption.leave(f"step {step} is saved")

    @property
    def _agree_every(self) -> int:
        """Steps after which several processes agree on whether to leave; one alone needs not ask."""
        return 1 if self._world.size == 1 else self.schedule.log_every

    def _step(self, batch_bd: Float[Tensor, "batch d_in"]) -> Any:
        """One step of SAE-Lens's trainer. Nothing here reads from the device."""
        trainer, step = self.trainer, self.trainer.n_training_steps
        trainer.maybe_reset_sparsity()
        output = trainer.step(self._world.share(batch_bd))
        trainer.n_training_steps += 1
        loss = output.loss.detach()
        self._first_bad = torch.where((self._first_bad < 0) & ~torch.isfinite(loss), step + 1, self._first_bad)
        self._world.reduce(trainer.n_forward_passes_since_fired, "min")
        every = self.schedule.resample_every
        if every and trainer.n_training_steps % every == 0:
            from sauce_hooks.sae.resampling import resample_dead

            dead_f = trainer.dead_neurons
            rows_bd = trainer.activation_scaler(batch_bd.to(self.sae.device))
            n = resample_dead(self.sae, trainer.optimizer, dead_f, rows_bd, self._resampling)
            trainer.n_forward_passes_since_fired[dead_f.nonzero()[:n]] = 0  # the first n were restarted
        return output

    def _stopped(self, interruption: Interruption) -> bool:
        """Whether to save and leave, for all processes if one was told to."""
        if self._world.size == 1:
            return interruption.signal is not None
        flag = torch.tensor(interruption.signal or 0, device=self._device)
        interruption.signal = int(self._world.reduce(flag, "max")) or None
        return interruption.signal is not None

    def _check_finite(self) -> None:
        """`DivergedError` if a loss was not finite, or the last step has left weights that are not."""
        fine = torch.stack([torch.isfinite(weight).all() for weight in self.sae.parameters()]).all()
        bad = torch.where((self._first_bad < 0) & ~fine, self.trainer.n_training_steps, self._first_bad)
        bad = self._world.reduce(bad, "max")
        if int(bad) >= 0:
            kept = self._folder.latest() if self._folder is not None else None
            good = f"the checkpoint at step {int(kept.name)} is good" if kept else "there is no checkpoint before it"
            raise DivergedError(
                f"the loss at step {int(bad)} or a weight after it is NaN or infinite; {good}. Train with a lower lr, or "
                "with a larger l1_coefficient warm-up; or, under bfloat16, in float32."
            )

    @torch.no_grad()
    def _metrics(self, output: Any) -> dict[str, float]:
        self._check_finite()
        trainer = self.trainer
        found = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
        kept = {
            _METRICS.get(k, k): float(v) for k, v in found.items() if k in _METRICS or not any(w in k for w in _LEFT_OUT)
        }
        kept["dead_share"] = float(trainer.dead_neurons.float().mean())
        if self._validation_nd is not None:
            kept |= self._validated(self._validation_nd)
        values = torch.tensor(list(kept.values()), dtype=torch.float64)
        if self._world.size > 1:
            values = self._world.reduce(values.to(self._device), "sum") / self._world.size
        return dict(zip(kept, values.tolist(), strict=True))

    def _validated(self, x_nd: Float[Tensor, "n d_in"]) -> Mapping[str, float]:
        self.sae.eval()
        error = squares = active = 0.0
        mean_d = x_nd.mean(0)
        for x_bd in x_nd.split(self.trainer.cfg.train_batch_size_samples):
            rows_bd = self.trainer.activation_scaler(x_bd.to(self.sae.device))
            z_bf = self.sae.encode(rows_bd)
            scale = self.trainer.activation_scaler.scaling_factor or 1.0
            error += float((rows_bd - self.sae.decode(z_bf)).pow(2).sum()) / scale**2
            squares += float((x_bd - mean_d).pow(2).sum())
            active += float((z_bf != 0).sum())
        self.sae.train()
        explained = 1 - error / squares if squares else math.nan  # one row, say, has no variance
        return {"validation/explained_variance": explained, "validation/l0": active / len(x_nd)}

    # Saving and going on ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint, if there is a folder for it."""
        self._check_finite()
        if self._folder is None:
            return
        state = {
            "feed": self.feed.state_dict(),  # every process, for each has its own place in the data
            "plan": self.plan,
            "resampling": self._resampling.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None,
        }
        fired = self._world.reduce(self.trainer.act_freq_scores.clone(), "sum")
        if self._world.is_first:
            ours, self.trainer.act_freq_scores = self.trainer.act_freq_scores, fired

            def write(folder: Path) -> None:
                self.trainer.save_trainer_state(folder)
                torch.save(self.sae.state_dict(), folder / "sae.pt")
                torch.save(state, folder / "state.pt")

            try:
                self._folder.save(self.trainer.n_training_steps, write)
            finally:
                self.trainer.act_freq_scores = ours
        self._world.wait()

    plan: Mapping[str, Any]
    """What was found out about the data before the first step."""

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint; the trainer must be as new.

        Raises:
            ResumeError: it is damaged.
        """
        with reading(checkpoint):
            self.sae.load_state_dict(torch.load(checkpoint / "sae.pt", weights_only=True, map_location=self._device))
            self.trainer.load_trainer_state(checkpoint)
            state = torch.load(checkpoint / "state.pt", weights_only=True, map_location="cpu")
            self.feed.load_state_dict(state["feed"])
            self._resampling.set_state(state["resampling"])
            torch.set_rng_state(state["torch"])
            if self._device.type == "cuda" and state["cuda"] is not None:
                torch.cuda.set_rng_state(state["cuda"], self._device)
        if not self._world.is_first:
            self.trainer.act_freq_scores.zero_()

    def finish(self) -> None:
        """What SAE-Lens records at the end of a training, over all processes."""
        trainer = self.trainer
        self._world.reduce(trainer.act_freq_scores, "sum")
        trainer.n_frac_active_samples *= self._world.size
        if trainer.n_frac_active_samples and math.isfinite(float(trainer.act_freq_scores.sum())):
            trainer.set_final_sae_metadata()
