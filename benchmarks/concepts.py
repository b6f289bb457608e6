"""How the cost of selecting and of erasing grows from 1 to 1,000 concepts, on a CPU. See README.md, "Many concepts"."""

from __future__ import annotations

import json
import random
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import torch
import typer
from erasure import TINY_TEXT, build_model, build_sae, edit_of, peak_bytes
from erasure import Sizes as ModelSizes
from rich.console import Console
from table import Table
from training import Estimate, median

from sauce_hooks import Concept, ConceptBank, ConceptEraser, VisionSAE, find_hook_point
from sauce_hooks.concepts import labelled_statistics
from sauce_hooks.concepts.many import learn_concepts
from sauce_hooks.concepts.overlap import overlap

PASS, SELECT = "pass over the images", "scores and selection"
BUILD, FIRST, EDIT, OVERLAP = "new eraser", "its first image", "each image after", "report of overlaps"
APART, TOGETHER = "no feature in two concepts", "most features in several concepts"
MIB = 2.0**20

progress = Console(stderr=True)


@dataclass(frozen=True)
class Sizes:
    """Of the tower, the SAEs and the work."""

    image: int = 336
    d: int = 1024
    d_sae: int = 16_384
    d_sae_erased: int = 32_768
    """Of the SAE whose features are erased: 1,000 concepts of 32 features that share none need as many."""
    images: int = 8
    k: int = 32
    """Features of a concept."""
    common: int = 2048
    """Features from which concepts that share some are drawn."""
    concepts: tuple[int, ...] = (1, 10, 100, 1000)


SMALL = Sizes(image=56, d=64, d_sae=1024, d_sae_erased=4096, images=4, k=4, common=64, concepts=(1, 10, 100))
Seconds = dict[str, dict[int, list[float]]]
"""By what was done, then by the number of concepts: one a round."""


class Bench:
    """A tower with one block before the hook, SAEs, images that show half of the concepts each, and concepts to erase."""

    def __init__(self, sizes: Sizes) -> None:
        torch.manual_seed(0)
        self.sizes = sizes
        layers = {"layers": 2, "heads": 4, "text": TINY_TEXT}
        shape = ModelSizes(image=sizes.image, d=sizes.d, d_mlp=sizes.d, **layers)
        self.model = build_model(shape, "cpu", torch.float32)
        self.read, self.erased = (self._sae(replace(shape, d_sae=d_sae)) for d_sae in (sizes.d_sae, sizes.d_sae_erased))
        self.pixels = {"pixel_values": torch.randn(sizes.images, 3, sizes.image, sizes.image)}
        self.tokens_btd = torch.randn(1, shape.patches, sizes.d)
        most = max(sizes.concepts)
        self.names = [f"concept {i}" for i in range(most)]
        chance = random.Random(0)
        # Each on every image but the first with even odds, and on the second, so that both of its sets are there.
        self.labels = [
            set(),
            set(self.names),
            *({n for n in self.names if chance.random() < 0.5} for _ in range(2, sizes.images)),
        ]
        apart = chance.sample(range(sizes.d_sae_erased), most * sizes.k)
        self.concepts = {
            APART: [Concept(n, tuple(apart[i * sizes.k : (i + 1) * sizes.k])) for i, n in enumerate(self.names)],
            TOGETHER: [Concept(n, tuple(chance.sample(range(sizes.common), sizes.k))) for n in self.names],
        }

    def _sae(self, shape: ModelSizes) -> VisionSAE:
        return VisionSAE.wrap(build_sae(shape, "standard", "cpu"), find_hook_point(self.model))

    def read_images(self, n: int) -> Any:
        """The statistics of the first concepts."""
        return labelled_statistics(self.model, self.read, [self.pixels], self.labels, self.names[:n])

    def select(self, statistics: Any) -> None:
        """All concepts of some statistics."""
        self.read.concepts = ConceptBank()
        learn_concepts(self.read, statistics, k=self.sizes.k)

    def eraser(self, kind: str, n: int) -> ConceptEraser:
        """Of the first concepts."""
        return ConceptEraser(self.model, self.erased, self.concepts[kind][:n])


def timed(seconds: Seconds, what: str, n: int, run: Callable[[], Any]) -> Any:
    """Run it and note its processor time."""
    start = time.process_time()
    result = run()
    seconds.setdefault(what, {}).setdefault(n, []).append(time.process_time() - start)
    return result


def turns(sizes: Sizes, rounds: int) -> list[tuple[int, int]]:
    """Round and number of concepts: each number once a round, each round starting with another."""
    numbers = sizes.concepts
    starts = [i % len(numbers) for i in range(rounds)]
    return [(i, n) for i, start in enumerate(starts) for n in (*numbers[start:], *numbers[:start])]


def measure_selection(bench: Bench, rounds: int) -> tuple[Seconds, dict[int, float]]:
    """Seconds, and the most memory in MiB that a pass takes."""
    seconds: Seconds = {}
    bench.read_images(1)
    for number, n in turns(bench.sizes, rounds):
        statistics = timed(seconds, PASS, n, lambda n=n: bench.read_images(n))
        timed(seconds, SELECT, n, lambda statistics=statistics: bench.select(statistics))
        progress.print(f"round {number + 1} of {rounds}: {n} concepts read in {seconds[PASS][n][-1]:.3g} s")
    memory = {n: peak_bytes(lambda n=n: bench.read_images(n), "cpu") / MIB for n in bench.sizes.concepts}
    return seconds, memory


def measure_erasing(bench: Bench, kind: str, rounds: int, calls: int = 3) -> tuple[Seconds, dict[int, float]]:
    """Seconds, and the most memory in MiB that the edit of an image takes once it is prepared."""
    seconds: Seconds = {}
    edits: dict[int, Any] = {}
    for _, n in turns(bench.sizes, rounds):
        eraser = timed(seconds, BUILD, n, lambda n=n: bench.eraser(kind, n))
        edit = timed(seconds, FIRST, n, lambda eraser=eraser: prepared(bench, eraser))
        start = time.process_time()
        for _ in range(calls):
            edit(bench.tokens_btd)
        seconds.setdefault(EDIT, {}).setdefault(n, []).append((time.process_time() - start) / calls)
        timed(seconds, OVERLAP, n, lambda n=n: overlap(bench.concepts[kind][:n]))
        edits[n] = edit
    return seconds, {n: peak_bytes(lambda edit=edit: edit(bench.tokens_btd), "cpu") / MIB for n, edit in edits.items()}


def prepared(bench: Bench, eraser: ConceptEraser) -> Any:
    """The eraser's edit as a function that has run once."""
    edit = edit_of(eraser)
    edit(bench.tokens_btd)
    return edit


def growth(seconds: dict[int, list[float]], n: int) -> str:
    """How many times as long n concepts take as one: median over the rounds, [95%]."""
    return str(Estimate.of_ratio(seconds[n], seconds[1]))


def tables(sizes: Sizes, selection: tuple[Seconds, dict[int, float]], erasing: dict[str, Any]) -> list[Table]:
    """As they are printed."""
    seconds, memory = selection
    whole = {n: [a + b for a, b in zip(seconds[PASS][n], seconds[SELECT][n], strict=True)] for n in sizes.concepts}
    found = [
        Table(
            f"Selecting, {sizes.images} images: seconds, and through those of one concept [95%]",
            ["concepts", PASS, "ratio", SELECT, "ratio", "both", "slower than linear", "most memory"],
            [
                [
                    f"{n:,}",
                    *(
                        cell
                        for what in (PASS, SELECT)
                        for cell in (f"{median(seconds[what][n]):.3g}", growth(seconds[what], n))
                    ),
                    growth(whole, n),
                    verdict(whole, n),
                    f"{memory[n]:.0f} MiB",
                ]
                for n in sizes.concepts
            ],
        )
    ]
    for kind, (times, most) in erasing.items():
        found.append(
            Table(
                f"Erasing, {kind}: seconds, and through those of one concept [95%]",
                ["concepts", *(c for what in (BUILD, FIRST, EDIT) for c in (what, "ratio")), "slower than linear", OVERLAP,
                 "most memory"],
                [
                    [
                        f"{n:,}",
                        *(
                            cell
                            for what in (BUILD, FIRST, EDIT)
                            for cell in (f"{median(times[what][n]):.2g}", growth(times[what], n))
                        ),
                        verdict(times[EDIT], n),
                        f"{median(times[OVERLAP][n]):.2g}",
                        f"{most[n]:.1f} MiB",
                    ]
                    for n in sizes.concepts
                ],
            )
        )  # fmt: skip
    return found


def verdict(seconds: dict[int, list[float]], n: int) -> str:
    """Whether even the upper end of the interval is below n."""
    return "" if n == 1 else "yes" if Estimate.of_ratio(seconds[n], seconds[1]).high < n else "no"


def main(
    rounds: Annotated[int, typer.Option(help="How often each variant runs.")] = 3,
    small: Annotated[bool, typer.Option(help="A smoke run; its ratios mean nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Every number, to standard output.")] = False,
    markdown: Annotated[bool, typer.Option(help="The tables as Markdown.")] = False,
) -> None:
    """Print what 1 to 1,000 concepts cost to select and to erase, as ratios to one concept within this run, on a CPU."""
    started = time.perf_counter()
    warnings.filterwarnings("ignore")
    sizes, rounds = (SMALL, 1) if small else (Sizes(), rounds)
    bench = Bench(sizes)
    erasing = {kind: measure_erasing(bench, kind, 2 * rounds) for kind in (APART, TOGETHER)}
    progress.print(f"erasing: {time.perf_counter() - started:.0f} s so far")
    selection = measure_selection(bench, rounds)
    setting = (
        f"CPU, {torch.get_num_threads()} thread(s), processor time; torch {torch.__version__}; float32; d = {sizes.d}, "
        f"{bench.tokens_btd.shape[1]} tokens an image, {sizes.k} features a concept; D = {sizes.d_sae:,} for selecting and "
        f"{sizes.d_sae_erased:,} for erasing; {rounds} rounds, {2 * rounds} of erasing"
    )
    printed = tables(sizes, selection, erasing)
    if as_json:
        found = {"setting": setting, "sizes": asdict(sizes), "selecting": selection, "erasing": erasing}
        json.dump(found, sys.stdout, indent=1)
        print()
    elif markdown:
        print(setting + "\n\n" + "\n".join(table.markdown() for table in printed))
    else:
        console = Console(width=None if sys.stdout.isatty() else 180)
        console.print(setting, *(table.rich() for table in printed), sep="\n\n")
    progress.print(f"done in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    typer.run(main)
