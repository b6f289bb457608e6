# %% [markdown]
# # A concept from folders of photos
# Photos that show a concept in one folder, photos that do not in another, and those of a sibling to be kept in a third.
# The concept is tuned on them by cross-validation, and what erasing it is measured to do is saved with it.

# %%
import tempfile
from pathlib import Path

import sauce_hooks as sh

model, processor, sae = sh.scenes.load()
sae.concepts = sh.ConceptBank()  # forget what the bundled bank knows

# %% [markdown]
# Your photos lie there already; here they are drawn.

# %%
photos = Path(tempfile.mkdtemp())
kinds = {"tiger": {"contains": "tiger"}, "cat": {"contains": "cat", "lacks": "tiger"}, "other": {"lacks": "tiger"}}
for seed, (name, kind) in enumerate(kinds.items()):
    (photos / name).mkdir()
    for i, scene in enumerate(sh.scenes.sample(24, seed=seed, split="train", **kind)):
        scene.image.save(photos / name / f"{i}.png")

# %%
concept = sh.tune_concept(
    model,
    sae,
    "tiger",
    positives=photos / "tiger",
    negatives=photos / "other",
    siblings={"cat": photos / "cat"},
    processor=processor,
    wording=sh.scenes.wording(),  # leave it out for a model that understands plain English
    tuning={"ks": (2, 8), "gammas": (0.0, -1.0)},
)
print(f"tuned:    {len(concept.features)} features, gamma {concept.gamma:g}, measured on {concept.effect.images}")
for metric, rate in concept.effect.figures.items():
    print(f"{metric:<9} {rate.value:.0%} [{rate.low:.0%}, {rate.high:.0%}] of {rate.n}")

# %%
sae.save(photos / "sae")
again = sh.VisionSAE.load(photos / "sae")
print("saved:   ", ", ".join(again.concepts))

# %%
scene = sh.scenes.sample(1, seed=9, contains="tiger")[0]
inputs = processor(images=scene.image, text=sh.scenes.describe_prompt(), return_tensors="pt")
with sh.ConceptEraser(model, again, ["tiger"]):
    output = model.generate(**inputs, do_sample=False)
print("truth:   ", scene.caption)
print("erased:  ", processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
