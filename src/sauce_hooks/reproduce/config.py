"""The protocol of an experiment with a real model, as data: a TOML file, read into frozen dataclasses.

Configurations that ship are in `configs/`; docs/paper-scale.md says what every key means. A file is checked as a whole
when it is read: an unknown key, a value of the wrong kind, or two that contradict each other raise `ConfigError`.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from dataclasses import asdict, field, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from sauce_hooks.errors import ConfigError, PresetError, TokenPolicyError
from sauce_hooks.evaluation.baselines import METHODS, OBJECTIVES, Settings
from sauce_hooks.evaluation.baselines.weights import Kind, Parts
from sauce_hooks.evaluation.wordings import PHRASINGS
from sauce_hooks.hookpoint import TokenPolicy
from sauce_hooks.hookpoint.tokens import EditTokens, ReadTokens
from sauce_hooks.reproduce.study import Size, Task
from sauce_hooks.sae.presets import PRESETS, Preset

_STRICT = ConfigDict(extra="forbid", strict=True)
ATTACKS = ("second language", "quantisation", "paraphrases", "adversarial images")
"""The attacks of Figure 7 and beyond it, as `Study.attacks` names them."""
Count = Annotated[int, Field(ge=1)]
Synsets = dict[str, int]
"""Synsets of ImageNet-1k, with the number of each class."""


@dataclass(frozen=True, config=_STRICT)
class Domain:
    """Concepts of one kind."""

    name: str
    task: Task
    concepts: tuple[str, ...]
    imagenet: dict[str, Synsets] = field(default_factory=dict[str, Synsets])
    """Of each concept, its ImageNet classes; empty where the images are in folders."""

    def __post_init__(self) -> None:
        if self.imagenet and set(self.imagenet) != set(self.concepts):
            odd = sorted(set(self.imagenet) ^ set(self.concepts))
            raise ValueError(f"domain {self.name!r}: all its concepts or none have ImageNet classes; one-sided: {odd}")


@dataclass(frozen=True, config=_STRICT)
class Model:
    """A model on the Hugging Face hub, or in a folder."""

    id: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    layer: int | str | None = None
    """The hook point, as `find_hook_point` takes it."""


@dataclass(frozen=True, config=_STRICT)
class Tokens:
    """As `TokenPolicy` has it."""

    read: ReadTokens = "patches"
    edit: EditTokens = "patches"
    per_image: Count | None = None

    @property
    def policy(self) -> TokenPolicy:
        """The same, as the library takes it."""
        return TokenPolicy(self.read, self.edit, self.per_image)


@dataclass(frozen=True, config=_STRICT)
class SAE:
    """A trained SAE, or how one is trained."""

    source: str | None = None
    """A folder or an id on the hub. What follows is for training, and then not needed."""
    preset: str = "batchtopk"
    dataset: str | None = None
    """A dataset on the hub, one that `save_to_disk` wrote, or a folder of images."""
    split: str = "train"
    n_images: Count | None = None
    """Of an epoch; None: all."""
    tokens: Tokens | None = None
    """The preset's by default."""
    changes: dict[str, Any] = field(default_factory=dict[str, Any])
    """Fields of `Preset` to change."""
    image_batch_size: Count = 64
    workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that decode images, beside each that trains; None: as many as there are cores to spare."""

    def __post_init__(self) -> None:
        if self.source is None and self.dataset is None:
            raise ValueError("name a trained one (source) or the images to train one on (dataset)")
        if self.preset not in PRESETS:
            raise ValueError(f"unknown preset {self.preset!r}; known: {', '.join(PRESETS)}")
        if odd := [name for name in self.changes if name not in Preset.__dataclass_fields__]:
            raise ValueError(f"changes: a preset has no {', '.join(odd)}; it has {', '.join(Preset.__dataclass_fields__)}")
        try:
            if self.tokens is not None:
                _ = self.tokens.policy
        except (TokenPolicyError, PresetError) as problem:
            raise ValueError(str(problem)) from problem


@dataclass(frozen=True, config=_STRICT)
class Objects:
    """Where images with ImageNet classes come from."""

    dataset: str
    """A dataset on the hub or on disk with the columns `image` and `label`, or a folder of folders named by synset."""
    train: str = "train"
    test: str = "validation"


@dataclass(frozen=True, config=_STRICT)
class Images:
    """Images in folders, and how many of every concept are used."""

    folder: str | None = None
    """FOLDER/DOMAIN/CONCEPT/*.jpg."""
    training: Count = 200
    """Of each concept, to choose features from and for the rivals to be trained on, at the most."""
    test: Count = 50
    """Of each concept, to report on, at the most."""
    least: Count = 10
    """Of either kind: a concept that has fewer is left out."""
    absent: tuple[str, ...] = ()
    """Domains of which an image shows one concept, so that the others are known to be absent."""


@dataclass(frozen=True, config=_STRICT)
class Learning:
    """How the features of a concept are found."""

    how: Literal["tuned", "paper"] = "tuned"
    """`tune_concept`; or `learn_concept` with the `k` and `gamma` given here."""
    k: Count = 32
    """Of "paper", which does not say how many."""
    gamma: float = -0.5
    """Of "paper"."""
    negatives: Count = 200
    """Training images without the concept."""
    per_sibling: Count = 24
    """Of "tuned": training images of each other concept of the domain."""
    ks: tuple[Count, ...] = (2, 4, 16, 32)
    """Of "tuned": numbers of features tried."""
    gammas: tuple[float, ...] = (0.0, -0.25, -0.5, -0.75, -1.0, -1.5, -2.0)
    """Of "tuned": factors tried."""


@dataclass(frozen=True, config=_STRICT)
class Questions:
    """How the model is asked."""

    phrasing: int = 0
    """Of `evaluation.PHRASINGS`; 0 is the paper's."""
    max_new_tokens: Count = 256
    """Of a description."""
    second_language: str | None = None

    def __post_init__(self) -> None:
        for language in filter(None, ("en", self.second_language)):
            if language not in PHRASINGS:
                raise ValueError(f"no prompts in {language!r}; there are {', '.join(PHRASINGS)}")
            least = min(len(PHRASINGS[language].yes_no), len(PHRASINGS[language].describe))
            if language == "en" and not -least <= self.phrasing < least:
                raise ValueError(f"no phrasing {self.phrasing}: 0 to {least - 1}, or -1 for the held-out one")


@dataclass(frozen=True, config=_STRICT)
class Judging:
    """Who decides whether a description names a concept."""

    kind: Literal["lexicon", "endpoint"] = "lexicon"
    model: str | None = None
    """Of an endpoint."""
    url: str | None = None
    """Of an endpoint, up to its version."""
    key: str | None = "OPENAI_API_KEY"
    """The environment variable that holds the endpoint's key; never the key itself."""
    max_requests: Count | None = None

    def __post_init__(self) -> None:
        if self.kind == "endpoint" and not (self.model and self.url):
            raise ValueError("an endpoint needs model and url")


@dataclass(frozen=True, config=_STRICT)
class Training:
    """What all weight-updating rivals share; see `evaluation.baselines.Settings`."""

    kind: Kind = "lora"
    parts: Parts = "language"
    steps: Count = 13
    batch_size: Count = 16
    rank: Count = 8
    seed: int = 0


@dataclass(frozen=True, config=_STRICT)
class Rivals:
    """What SAUCE is compared with."""

    methods: tuple[str, ...] = ("GA", "GD", "KL", "PO")
    """Names of `evaluation.baselines.METHODS`."""
    rates: dict[str, float] = field(default_factory=dict[str, float])
    """Learning rates that are known."""
    tried: tuple[float, ...] = ()
    """Of methods without one: what is tried on validation images of `swept`."""
    swept: tuple[str, ...] = ()
    settings: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        if odd := [name for name in self.methods if name not in METHODS]:
            raise ValueError(f"unknown method {odd[0]!r}; known: {', '.join(METHODS)}")
        if self.to_sweep and not (self.tried and self.swept):
            raise ValueError(f"no learning rate for {', '.join(self.to_sweep)}: give rates, or tried and swept")

    @property
    def to_sweep(self) -> tuple[str, ...]:
        """Weight-updating methods whose learning rate must be found."""
        return tuple(name for name in self.methods if name in OBJECTIVES and name not in self.rates)

    def trained_with(self, lr: float) -> Settings:
        """Settings with a learning rate."""
        return Settings(lr, **asdict(self.settings))


@dataclass(frozen=True, config=_STRICT)
class Attacks:
    """Which attacks there are."""

    names: tuple[str, ...] = ()
    paraphrases_max_new_tokens: Count = 48

    def __post_init__(self) -> None:
        if odd := [name for name in self.names if name not in ATTACKS]:
            raise ValueError(f"unknown attack {odd[0]!r}; known: {', '.join(ATTACKS)}")


@dataclass(frozen=True, config=_STRICT)
class Kin:
    """A model that the SAE is carried over to."""

    name: str
    expected: Literal["transfers", "ruined"]
    model: Model


@dataclass(frozen=True, config=_STRICT)
class Measured(Size):
    """`Size`, with no key that it does not have."""


@dataclass(frozen=True, config=_STRICT)
class Protocol:
    """All of it."""

    name: str
    model: Model
    sae: SAE
    images: Images
    domains: tuple[Domain, ...]
    """From the table of concepts that `concepts` names."""
    objects: Objects | None = None
    learning: Learning = field(default_factory=Learning)
    questions: Questions = field(default_factory=Questions)
    judge: Judging = field(default_factory=Judging)
    rivals: Rivals = field(default_factory=Rivals)
    attacks: Attacks = field(default_factory=Attacks)
    relatives: tuple[Kin, ...] = ()
    size: Measured = field(default_factory=Measured)
    batch_size: Count = 32

    def __post_init__(self) -> None:
        names = [domain.name for domain in self.domains]
        concepts = [concept for domain in self.domains for concept in domain.concepts]
        if twice := sorted({name for name in (*names, *concepts) if (names + concepts).count(name) > 1}):
            raise ValueError(f"{', '.join(twice)}: twice in the table of concepts; one name must mean one thing")
        if odd := [name for name in self.images.absent if name not in names]:
            raise ValueError(f"images.absent: no domain {odd[0]!r}; there are {', '.join(names)}")
        if self.rivals.to_sweep and (odd := [name for name in self.rivals.swept if name not in concepts]):
            raise ValueError(f"rivals.swept: {odd[0]!r} is no concept of the table")
        in_folders = [domain.name for domain in self.domains if not domain.imagenet]
        if in_folders and self.images.folder is None:
            raise ValueError(f"images.folder: where the images of {', '.join(in_folders)} are")
        if len(in_folders) < len(names) and self.objects is None:
            raise ValueError("[objects]: the dataset that images with ImageNet classes come from")
        if "second language" in self.attacks.names and self.questions.second_language is None:
            raise ValueError("the attack 'second language' needs questions.second_language, such as \"zh\"")

    @property
    def prepared(self) -> dict[str, Any]:
        """What decides that which is prepared once: after a change, it must be prepared anew."""
        parts = ("model", "sae", "images", "objects", "domains", "learning", "questions", "rivals")
        found = {name: getattr(self, name) for name in parts}
        plain = {n: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for n, v in found.items()}
        plain["domains"] = {domain.name: asdict(domain) for domain in self.domains}
        return json.loads(json.dumps(plain))


def configs() -> dict[str, Path]:
    """The configurations that ship, by name."""
    folder = Path(str(files("sauce_hooks.reproduce") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.toml")) if path.stem != "table1"}


def read(config: str | Path) -> Protocol:
    """Read a configuration.

    Args:
        config: the name of one that ships ("llava-1.5-7b"), or the path of a TOML file. In it `concepts` names the table of
            concepts: "table1", or the path of another TOML file, relative to this one.

    Raises:
        ConfigError: no such configuration, or something in it that cannot be; names the key, and what could be there.
    """
    path = find(config)
    content = _toml(path)
    table = content.pop("concepts", "table1")
    if not isinstance(table, str):
        raise ConfigError(f'{path}: concepts must name a table, "table1" or the path of a TOML file; found {table!r}')
    listed = Path(str(files("sauce_hooks.reproduce") / "configs" / "table1.toml"))
    listed = listed if table == "table1" else path.parent / table
    if not listed.is_file():
        raise ConfigError(f'{path}: concepts = {table!r}: no such file as {listed}. Give "table1" or the path of a table')
    more = _toml(listed)
    if set(more) != {"domains"}:
        raise ConfigError(f"{listed}: a table of concepts holds [[domains]] and nothing else; found {', '.join(more)}")
    try:  # as JSON: there, a strict check takes a list for a tuple
        return TypeAdapter(Protocol).validate_json(json.dumps({**content, **more}))
    except ValidationError as problem:
        raise ConfigError(f"{path}: {'; '.join(_said(error) for error in problem.errors())}") from problem


def find(config: str | Path) -> Path:
    """The file of a configuration.

    Raises:
        ConfigError: there is none.
    """
    known = configs()
    if str(config) in known:
        return known[str(config)]
    path = Path(config)
    if path.suffix == ".toml" and path.is_file():
        return path.resolve()
    near = difflib.get_close_matches(str(config), known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"no configuration {str(config)!r}: give one of {', '.join(known)}, or the path of a .toml file.{hint}"
    )


def _toml(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        json.dumps(content)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise ConfigError(f"{path} cannot be read as TOML: {problem}") from problem
    except TypeError as problem:
        raise ConfigError(f"{path} holds a date or a time; no key takes one") from problem
    return content


def _said(error: Any) -> str:
    """What is wrong at one place of the file."""
    loc = [part for part in error["loc"] if not (isinstance(part, str) and part.startswith(("function-", "tuple[")))]
    where = ".".join(str(part) for part in loc)
    if error["type"] == "unexpected_keyword_argument":
        known = [one.name for one in fields(_type_at(loc[:-1])) if one.init]
        near = difflib.get_close_matches(str(loc[-1]), known, n=1)
        return f"{where}: no such key; known: {', '.join(known)}" + (f". Did you mean {near[0]}?" if near else "")
    if error["type"] == "missing":
        return f"{where} is missing"
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}" if where else str(error["ctx"]["error"])
    return f"{where}: {error['msg']}; found {error['input']!r:.60}"


def _type_at(loc: list[Any]) -> Any:
    """The dataclass at a place of the file."""
    found: Any = Protocol
    for part in loc:
        found = found if isinstance(part, int) else get_type_hints(found)[part]
        while get_origin(found) is not None:  # X | None, tuple[X, ...]
            found = next(one for one in get_args(found) if is_dataclass(one) or get_origin(one) is not None)
    return found
