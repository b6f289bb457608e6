# %% [markdown]
# # Quickstart
# The bundled model describes an image before, while and after it forgets "red" and "tiger". Needs no network.

# %%
import sauce_hooks as sh

model, processor, sae = sh.scenes.load()
scene = next(s for s in sh.scenes.sample(300, seed=2, contains="tiger") if "red" in s.concepts)
inputs = processor(images=scene.image, text=sh.scenes.describe_prompt(), return_tensors="pt")


def describe() -> str:
    output = model.generate(**inputs, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# %%
print("truth: ", scene.caption)
print("before:", describe())
with sh.ConceptEraser(model, sae, ["red", "tiger"]):
    print("erased:", describe())
print("after: ", describe())
