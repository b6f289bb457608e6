"""The pictures of the front pages and what stands beside them: `python docs/pictures.py` draws and writes both anew.

What the model says is asked of it in this very run; `tests/test_site.py` asks again.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

import sauce_hooks as sh
from sauce_hooks.scenes.world import Scene, stream

DOCS = Path(__file__).parent
PAGES = {DOCS / "index.md": "assets", DOCS.parent / "README.md": "docs/assets"}
"""The pages that show them, and where the pictures lie as seen from there."""
BEGIN, END = "<!-- made by docs/pictures.py -->\n\n", "\n<!-- until here -->\n"
ERASED = ("red", "tiger")
SHOWN = (("red", "tiger"), ("tiger",), ("red",), ())
"""Which of the erased concepts each scene holds."""
SEED, TRIED = 7_000, 5
COLOURS = 128
"""Colours of a picture: what makes it small."""


@dataclass(frozen=True)
class Shown:
    """A scene, and what the model says of it."""

    scene: Scene
    before: str
    after: str


def describe(model: Any, processor: Any, scene: Scene) -> str:
    """The model's answer."""
    inputs = processor(images=scene.image, text=sh.scenes.describe_prompt(), return_tensors="pt")
    output = model.generate(**inputs, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def ask(model: Any, processor: Any, sae: Any) -> list[Shown]:
    """Of each kind the first scene that the model describes without a mistake: what it cannot see it cannot forget.

    What it says while it forgets has no part in the choice.
    """
    shown: list[Shown] = []
    for i, held in enumerate(SHOWN):
        kind = (s for s in stream(seed=SEED + i) if s.concepts.intersection(ERASED) == set(held) and len(s.things) == 2)
        described = ((scene, describe(model, processor, scene)) for scene in islice(kind, TRIED))
        scene, before = next((scene, said) for scene, said in described if said == scene.caption)
        with sh.ConceptEraser(model, sae, ERASED):
            shown.append(Shown(scene, before, describe(model, processor, scene)))
    return shown


def picture(scene: Scene) -> Image.Image:
    """The scene in few colours."""
    return scene.image.quantize(COLOURS, dither=Image.Dither.NONE)


def table(shown: list[Shown], assets: str) -> str:
    """The table of a front page, in Markdown; what is to be forgotten is bold."""
    names = ", ".join(f'"{name}"' for name in ERASED)
    rows = [f"| image | before | with `ConceptEraser(model, sae, [{names}])` |", "|---|---|---|"]
    for i, one in enumerate(shown):
        before, after = one.before, one.after
        for name in ERASED:
            before, after = (text.replace(name, f"**{name}**") for text in (before, after))
        rows.append(f"| ![{one.scene.caption}]({assets}/scene-{i}.png) | {before} | {after} |")
    return "\n".join(rows) + "\n"


def written(page: str) -> str:
    """What stands on the page now."""
    return page.split(BEGIN)[1].split(END)[0]


def main() -> None:
    """Draw and write."""
    shown = ask(*sh.scenes.load())
    for i, one in enumerate(shown):
        picture(one.scene).save(DOCS / "assets" / f"scene-{i}.png", optimize=True)
    for path, assets in PAGES.items():
        page = path.read_text(encoding="utf-8")
        path.write_text(page.replace(written(page), table(shown, assets)), encoding="utf-8")


if __name__ == "__main__":
    main()
