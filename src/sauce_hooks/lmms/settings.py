"""What `--model_args` may say, and what of it goes together."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from sauce_hooks.errors import LmmsEvalError

BUNDLED = "bundled"
"""As `pretrained` the bundled model, as `sae` its SAE."""
SEPARATOR = "+"
"""Between concepts: lmms-eval splits `--model_args` at commas."""
_OF_ERASER = ("gamma", "preserve_error", "edit", "allow_mismatch", "allow_bypass")
"""What goes to `ConceptEraser`."""


@dataclass(frozen=True)
class Settings:
    """The settings of a model for lmms-eval. All that changes an answer is here, since its cache knows models by these."""

    pretrained: str = ""
    """A folder, an id on the Hugging Face hub, or `BUNDLED`."""
    sae: str | None = None
    """A folder, an id on the hub, or `BUNDLED`."""
    erase: tuple[str, ...] = ()
    """Names in the SAE's bank; none: the model as it is."""
    gamma: float | None = None
    """This and those below as `ConceptEraser` takes them."""
    preserve_error: bool = True
    edit: str | None = None
    allow_mismatch: bool = False
    allow_bypass: bool = False
    dtype: str = "auto"
    """A torch dtype by its name; "auto" is the checkpoint's."""
    device: str | None = None
    """"cpu", "cuda:0", ...; "auto" spreads the model over all there are. None: a GPU if there is one."""
    batch_size: int = 1
    max_new_tokens: int = 1024
    """Of an answer, where the task does not say."""

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Settings:
        """From the arguments as lmms-eval has parsed them: numbers and booleans are no strings any more.

        Raises:
            LmmsEvalError: an unknown argument, one of another kind, or some that do not go together.
        """
        known = {field.name: field for field in fields(cls)}
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise LmmsEvalError(f"unknown model argument {name!r}.{hint} Known: {', '.join(known)}.")
        read = {name: _READERS[str(known[name].type)](name, value) for name, value in given.items()}
        return replace(cls(), **read).checked()

    def checked(self) -> Settings:
        """Itself, or `LmmsEvalError`."""
        if not self.pretrained:
            raise LmmsEvalError("which model? Say pretrained=FOLDER_OR_HUB_ID in --model_args, or pretrained=bundled")
        if self.erase and self.sae is None:
            raise LmmsEvalError(f"erase={SEPARATOR.join(self.erase)} needs an SAE: say sae=FOLDER_OR_HUB_ID in --model_args")
        if not self.erase:
            plain = Settings()
            idle = [name for name in _OF_ERASER if getattr(self, name) != getattr(plain, name)]
            if idle:
                raise LmmsEvalError(f"{', '.join(idle)} would have no effect: no concept is erased. Add erase=NAME")
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise LmmsEvalError(f"{name} must be at least 1, not {getattr(self, name)}")
        return self

    @property
    def eraser(self) -> dict[str, Any]:
        """The keyword arguments of `ConceptEraser`."""
        return {name: getattr(self, name) for name in _OF_ERASER}


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool) or not str(value):
        raise LmmsEvalError(f"{name}={value}: text is expected")
    return str(value)  # a folder called 2024 has become a number


def _names(name: str, value: Any) -> tuple[str, ...]:
    names = [part.strip() for part in str(value).split(SEPARATOR)]
    if not all(names):
        raise LmmsEvalError(f"{name}={value}: an empty name. Write {name}=red{SEPARATOR}tiger, or leave {name}= out")
    return tuple(names)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LmmsEvalError(f"{name}={value}: a number is expected, {name}=-0.5 for instance")
    return float(value)


def _integer(name: str, value: Any) -> int:
    try:
        return int(str(value))  # --batch_size comes as text
    except ValueError:
        raise LmmsEvalError(f"{name}={value}: a whole number is expected") from None


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise LmmsEvalError(f"{name}={value}: True or False is expected")
    return value


_READERS: Mapping[str, Any] = {
    "str": _text,
    "str | None": _text,
    "tuple[str, ...]": _names,
    "float | None": _number,
    "int": _integer,
    "bool": _boolean,
}
"""How a value becomes one of a field's type."""
