"""The model that lmms-eval runs: an adapter between its requests and `asking`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from sauce_hooks.errors import LmmsEvalError
from sauce_hooks.lmms import asking
from sauce_hooks.lmms.settings import BUNDLED, Settings

if TYPE_CHECKING:
    from sauce_hooks.sae import VisionSAE

INSTALL = "pip install 'sauce-hooks[lmms-eval]' && pip install --no-deps lmms-eval"

try:
    from lmms_eval.api.model import lmms as _Model
except ImportError as problem:  # pragma: no cover - with lmms-eval installed; a test runs it without
    raise LmmsEvalError(f"lmms-eval is not installed, or not all that it needs ({problem}): {INSTALL}") from problem


class SauceModel(_Model):
    """A Hugging Face vision-language model for lmms-eval, with an eraser on for as long as it lives, or without one.

    Args:
        arguments: what `--model_args`, `--batch_size` and `--device` say; see `Settings`.

    Raises:
        LmmsEvalError: arguments that cannot be.
        UnknownConceptError: a concept that the SAE's bank does not hold.
        SAEMismatchError: the SAE does not fit the model.
        IneffectiveEraserError: the edit does not take effect: here, in the first forward, or found out at the end.
    """

    is_simple = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        from accelerate import Accelerator

        from sauce_hooks.erasure import ConceptEraser

        self.settings = Settings.read(arguments)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.model, self.processor = _load(self.settings, _device(self.settings, self.accelerator))
        self.eraser: ConceptEraser | None = None
        if self.settings.erase:
            sae = _load_sae(str(self.settings.sae))
            self.eraser = ConceptEraser(self.model, sae, self.settings.erase, **self.settings.eraser).attach()

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return next(self.model.parameters()).device

    @property
    def batch_size(self) -> int:
        """Questions asked at once."""
        return self.settings.batch_size

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers, in the order of the requests. A failure is raised: an answer left empty would be scored as one."""
        said = [""] * len(requests)
        bar = tqdm(total=len(requests), desc="sauce", unit="answer", disable=self.rank != 0)
        alike = sorted(range(len(requests)), key=lambda i: repr(sorted(requests[i].args[1].items())))
        for _, group in groupby(alike, key=lambda i: repr(sorted(requests[i].args[1].items()))):
            same = list(group)
            for at in range(0, len(same), self.batch_size):
                batch = same[at : at + self.batch_size]
                self._answer([(i, requests[i]) for i in batch], said)
                bar.update(len(batch))
        bar.close()
        return said

    def _answer(self, requests: Sequence[tuple[int, Any]], said: list[str]) -> None:
        """Writes the answers of a batch of requests with the same generation settings; those without images apart."""
        given = requests[0][1].args[1]
        settings = asking.generation(given, self.settings.max_new_tokens)
        opened = [(i, self._asked(request.args[0], *request.args[2:])) for i, request in requests]
        for part in ([one for one in opened if one[1].images], [one for one in opened if not one[1].images]):
            if part:
                texts = asking.answers(self.model, self.processor, [one for _, one in part], settings)
                for (i, _), text in zip(part, texts, strict=True):
                    said[i] = asking.cut(text, asking.stops(given)).strip()

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of each request's continuation the mean loss, as lmms-eval's own models return it, and whether it is greedy."""
        losses: list[tuple[float, bool]] = []
        for request in tqdm(requests, desc="sauce", unit="choice", disable=self.rank != 0):
            question, target, *place = request.args
            _, doc_id, task, split = place
            continuation = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
            losses.append(asking.loss(self.model, self.processor, self._asked(question, *place), str(continuation)))
        return losses

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused.

        Raises:
            LmmsEvalError: always.
        """
        raise LmmsEvalError("tasks of several rounds are not supported by this model: choose tasks of single questions")

    def clean(self) -> None:
        """Turns the eraser off when all is answered; `IneffectiveEraserError` if the edit never took effect."""
        eraser, self.eraser = self.eraser, None
        if eraser is not None:
            eraser.detach()
        super().clean()

    def _asked(self, question: str, doc_to_visual: Any, doc_id: int, task: str, split: str) -> asking.Asked:
        return asking.asked(self.processor, question, doc_to_visual(self.task_dict[task][split][doc_id]))


def _device(settings: Settings, accelerator: Any) -> str:
    """Each of several processes has a whole model on a device of its own."""
    if accelerator.num_processes == 1:
        return settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if settings.device not in (None, accelerator.device.type):
        raise LmmsEvalError(
            f"device={settings.device} with {accelerator.num_processes} processes: each takes a device of its own. "
            "Leave the device out, or start one process"
        )
    return str(accelerator.device)


def _load(settings: Settings, device: str) -> tuple[Any, Any]:
    if settings.pretrained == BUNDLED:
        from sauce_hooks.scenes.bundled import load_model

        network, processor = load_model()
        dtype = _dtype(settings.dtype)
        network = network.to(device="cpu" if device == "auto" else device)
        return (network if dtype == "auto" else network.to(dtype=dtype)), processor
    from transformers import AutoModelForImageTextToText, AutoProcessor

    place = {"device_map": "auto"} if device == "auto" else {}
    network: Any = AutoModelForImageTextToText.from_pretrained(settings.pretrained, dtype=_dtype(settings.dtype), **place)
    processor: Any = AutoProcessor.from_pretrained(settings.pretrained)
    return (network if place else network.to(device)).eval(), processor


def _dtype(name: str) -> Any:
    found = getattr(torch, name, None)
    if name != "auto" and not isinstance(found, torch.dtype):
        raise LmmsEvalError(f"dtype={name}: no dtype of torch; auto, bfloat16, float16 or float32 for instance")
    return "auto" if name == "auto" else found


def _load_sae(source: str) -> VisionSAE:
    from sauce_hooks.sae import VisionSAE

    if source != BUNDLED:
        return VisionSAE.load(source)
    from sauce_hooks.scenes.bundled import asset

    return VisionSAE.load(Path(asset("sae")))
