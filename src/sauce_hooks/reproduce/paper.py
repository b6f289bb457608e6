"""The paper's experiments with a real model: what a configuration says, as a `Study`.

<!-- not run: days of GPUs -->

```python
prepare("llava-1.5-7b", "runs/llava")        # images, SAE, concepts, learning rates; goes on where it was ended
study = paper("llava-1.5-7b", "runs/llava")()
```

In several processes, started by `accelerate launch`, each calls both; every study is on its process's own device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from sauce_hooks.errors import EvaluationWarning
from sauce_hooks.evaluation import Budget, Endpoint, Judge, Lexicon, Method, ProbeSet, wording
from sauce_hooks.evaluation.attacks import (
    AdversarialImages,
    Attack,
    Paraphrases,
    Quantisation,
    SecondLanguage,
    plain_paraphrases,
)
from sauce_hooks.evaluation.baselines import OBJECTIVES, Materials, make_methods
from sauce_hooks.evaluation.erasing import Erasing
from sauce_hooks.evaluation.labelled import Opening
from sauce_hooks.reproduce.collected import Collection, Pool
from sauce_hooks.reproduce.config import Protocol, read
from sauce_hooks.reproduce.preparing import (
    Folder,
    check,
    learnt,
    lessons,
    load_model,
    load_sae,
    prepare,
    rates,
    require,
    words,
)
from sauce_hooks.reproduce.study import OURS, Relative, Size, Study, Task

__all__ = ["paper", "paper_study", "prepare"]
_FEW = 2
"""Images of each retained concept in probes for attacks, which do not ask about them."""


def paper(config: str | Path, out: str | Path) -> Callable[[], Study]:
    """What makes the study of a configuration, in this process or, pickled, in another; `prepare` it first.

    Args:
        config: the name of a configuration that ships, or the path of a TOML file.
        out: the folder of results.
    """
    return partial(paper_study, str(config), str(Path(out).absolute()))


def paper_study(config: str, out: str) -> Study:
    """The study of a configuration that is prepared in `out`.

    Raises:
        ConfigError: the configuration cannot be, or its model cannot be loaded.
        ResumeError: it is not prepared, or `out` was prepared for another one.
    """
    protocol, folder = read(config), Folder(Path(out))
    check(protocol, folder)
    model, processor = load_model(protocol.model)
    sae = load_sae(protocol, folder)
    collection = Collection.load(folder.images)
    every = Pool.of(protocol, collection, {})
    bank, left_out = learnt(folder, sae, [concept for concept in every.concepts if concept not in sae.concepts])
    for concept in bank.values():
        sae.concepts.add(concept, sae=sae.record())
    pool = Pool.of(protocol, collection, left_out)
    require(protocol, pool)
    if pool.left_out:
        reasons = "; ".join(f"{concept} ({reason})" for concept, reason in pool.left_out.items())
        warnings.warn(
            f"{len(pool.left_out)} concepts of {protocol.name} are left out: {reasons}", EvaluationWarning, stacklevel=2
        )
    asked = words(protocol, processor)
    tasks: dict[Task, tuple[str, ...]] = {
        task: tuple(c for d in protocol.domains if d.task == task for c in d.concepts if c in pool.concepts)
        for task in get_args(Task)
        if any(domain.task == task for domain in protocol.domains)
    }
    data = lessons(protocol, folder, model, processor, pool)

    def sets(concept: str) -> tuple[Any, Any]:
        negatives = pool.others(concept, pool.concepts, protocol.learning.negatives)
        return Opening(pool.holding(concept)), Opening(negatives)

    def methods() -> Mapping[str, Method]:
        known = rates(protocol, folder)
        settings = {name: protocol.rivals.trained_with(lr) for name, lr in known.items() if name in OBJECTIVES}
        given = Materials(model, processor, sae, sets, data, settings, folder.weights)
        return {OURS: Erasing(model, sae, protocol.model.allow_bypass), **make_methods(given, protocol.rivals.methods)}

    def attack_probes(concepts: Sequence[str], n: int) -> ProbeSet:
        found = pool.probes(asked, n, _FEW)
        chosen = set(concepts)
        return replace(
            found,
            positives={concept: probes for concept, probes in found.positives.items() if concept in chosen},
            negatives={concept: probes for concept, probes in found.negatives.items() if concept in chosen},
        )

    return Study(
        name=protocol.name,
        model=model,
        processor=processor,
        sae=sae,
        tasks=tasks,
        probes=lambda n, retained: pool.probes(asked, n, retained),
        methods=methods,
        relatives=[
            Relative(kin.name, kin.expected, partial(load_model, kin.model), partial(words, protocol))
            for kin in protocol.relatives
        ],
        attacks=(lambda: attacks(protocol, processor)) if protocol.attacks.names else None,
        training=lambda concepts: pool.training(asked, concepts),
        attack_probes=attack_probes,
        allow_bypass=protocol.model.allow_bypass,
        judge=judge(protocol, folder),
        size=Size(**asdict(protocol.size)),
        batch_size=protocol.batch_size,
    )


def attacks(protocol: Protocol, processor: Any) -> Mapping[str, Attack]:
    """The attacks of a configuration, by name."""
    asked, language = protocol.questions, protocol.questions.second_language
    tokens = protocol.attacks.paraphrases_max_new_tokens
    made: Mapping[str, Callable[[], Attack]] = {
        "second language": lambda: SecondLanguage(
            {str(language): wording(processor, language=str(language), max_new_tokens=asked.max_new_tokens)}
        ),
        "quantisation": lambda: Quantisation(),
        "paraphrases": lambda: Paraphrases(
            {name: replace(one, max_new_tokens=tokens) for name, one in plain_paraphrases(processor).items()}
        ),
        "adversarial images": lambda: AdversarialImages(),
    }
    return {name: made[name]() for name in protocol.attacks.names}


def judge(protocol: Protocol, folder: Folder) -> Judge:
    """Who decides whether a description names a concept; an endpoint's verdicts are kept."""
    wanted = protocol.judge
    if wanted.kind == "lexicon":
        return Lexicon()
    assert wanted.model is not None and wanted.url is not None
    folder.path.mkdir(parents=True, exist_ok=True)
    return Endpoint(
        wanted.model,
        wanted.url,
        cache=folder.path / "verdicts.sqlite",
        budget=Budget(max_requests=wanted.max_requests),
        api_key_env=wanted.key,
    )
