# %% [markdown]
# # Several concepts at once
# Erasers stack, merge and stand for groups, in any order, with one and the same result. Banks merge too.

# %%
import torch

import sauce_hooks as sh

model, processor, sae = sh.scenes.load()
scene = next(s for s in sh.scenes.sample(300, seed=2, contains="tiger") if "red" in s.concepts)
inputs = processor(images=scene.image, text=sh.scenes.describe_prompt(), return_tensors="pt")


@torch.no_grad()
def logits() -> torch.Tensor:
    return model(**inputs).logits


# %% [markdown]
# Merged, stacked in the other order, or named at once: a feature that two of them name is edited once.

# %%
red, tiger = (sh.ConceptEraser(model, sae, [name]) for name in ("red", "tiger"))
with red | tiger:
    merged = logits()
with tiger, red, tiger:
    stacked = logits()
with sh.ConceptEraser(model, sae, ["tiger", "red"]):
    named = logits()
print("merged, stacked and named at once are equal:", torch.equal(merged, stacked) and torch.equal(merged, named))

# %% [markdown]
# Before many concepts are erased together: who shares features with whom. A difference keeps what is a concept's own.

# %%
print(sh.overlap(sae.concepts, sae))
own = sh.difference(sae.concepts["red"], sae.concepts["orange"])
print(f"red has {len(sae.concepts['red'].features)} features, {len(own.features)} of them not orange's")

# %% [markdown]
# A name for several, and somebody else's bank: where both know a name, the right one's concept counts.

# %%
sae.concepts.group("colours", ["red", "blue", "green"])
theirs = sh.ConceptBank([sh.Concept("red", own.features, gamma=-1.0)])
print(sae.concepts.diff(sae.concepts | theirs))
with sh.ConceptEraser(model, sae, ["colours", "tiger"]) as eraser:
    output = model.generate(**inputs, do_sample=False)
print("truth: ", scene.caption)
print("erased:", processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(eraser)
