# %% [markdown]
# # Bring your own vision-language model
# Find the place, train an SAE on images, learn a concept, erase it. The model here is the bundled one, loaded as any other.

# %%
import tempfile
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

import sauce_hooks as sh

MODEL = sh.scenes.asset("model")  # for example "llava-hf/llava-1.5-7b-hf"
model = AutoModelForImageTextToText.from_pretrained(MODEL)
processor = AutoProcessor.from_pretrained(MODEL, backend="pil")

# %% [markdown]
# Where concepts can be erased: one block of the vision tower, before the language side reads it.

# %%
place = sh.find_hook_point(model)
print(f"place:  {place.path}, {place.d_in} wide, block {place.layer + 1} of {place.n_layers}")

# %% [markdown]
# An SAE of that place. A few hundred images and half a minute are enough for a world of 34 concepts, not for yours.

# %%
images = [scene.image for scene in sh.scenes.sample(240, seed=1, split="train")]
out = Path(tempfile.mkdtemp()) / "sae"
sae = sh.train_sae(model, images, processor=processor, preset="batchtopk", epochs=8, batch_size=256, out=out, progress=False)
print(f"SAE:    {sae.stats.explained_variance:.0%} of the variance explained by {sae.stats.l0:.0f} features a token")

# %% [markdown]
# A concept from images that show it and images that do not.

# %%
tigers = sh.scenes.sample(40, seed=2, split="train", contains="tiger")
others = sh.scenes.sample(40, seed=3, split="train", lacks="tiger")
concept = sh.learn_concept(
    model, sae, "tiger", [s.image for s in tigers], [s.image for s in others], processor=processor, scorer="cohens_d", k=8
)
print("tiger: ", len(concept.features), "features, the best one", concept.features[0])

# %%
shown = sh.scenes.sample(10, seed=4, contains="tiger")
inputs = processor(
    images=[s.image for s in shown], text=[sh.scenes.yes_no_prompt("tiger")] * len(shown), return_tensors="pt", padding=True
)


def affirmed() -> int:
    output = model.generate(**inputs, do_sample=False, max_new_tokens=3)
    said = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(answer.strip().startswith("yes") for answer in said)


print(f"before: a tiger affirmed in {affirmed()} of {len(shown)} images with one")
with sh.ConceptEraser(model, sae, ["tiger"], gamma=-1.0):
    print(f"erased: a tiger affirmed in {affirmed()} of {len(shown)}")
