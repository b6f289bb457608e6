# %% [markdown]
# # In an nnsight trace
# The same edit for those who work with nnsight, in one trace (within `edit(inplace=True)` it is in all later ones). What it
# writes can be looked at in the same trace.

# %%
import torch
from nnsight import NNsight

import sauce_hooks as sh

model, processor, sae = sh.scenes.load()
scene = sh.scenes.sample(1, seed=5, contains="tiger")[0]
inputs = processor(images=scene.image, text=sh.scenes.yes_no_prompt("tiger"), return_tensors="pt")
yes, no = (processor.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
eraser = sh.ConceptEraser(model, sae, ["tiger"])
traced = NNsight(model)


def margin(logits: torch.Tensor) -> float:
    return float(logits[0, -1, yes] - logits[0, -1, no])


# %%
with torch.no_grad(), traced.trace(**inputs):
    seen = traced.model.multi_modal_projector.output.save()
    before = traced.output.logits.save()
print(f"yes − no before:  {margin(before):+.1f}")

# %%
with torch.no_grad(), traced.trace(**inputs):
    eraser.intervene(traced)
    changed = traced.model.multi_modal_projector.output.save()
    erased = traced.output.logits.save()
print(f"yes − no erased:  {margin(erased):+.1f}")
moved = (changed - seen).flatten(0, -2).norm(dim=-1) > 0
print(f"tokens of the image that differ for the language model: {int(moved.sum())} of {moved.numel()}")

# %% [markdown]
# The context manager gives the same, and a model that nnsight has wrapped is the model it was.

# %%
with torch.no_grad(), eraser:
    with_hooks = model(**inputs).logits
print("equal to the context manager's:", torch.allclose(with_hooks, erased, atol=1e-4))
print("afterwards as before:", torch.equal(model(**inputs).logits.detach(), before))
