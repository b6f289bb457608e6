# %% [markdown]
# # Beside fine-tuning
# The same concept erased, projected out, forbidden in the prompt, and unlearned by fine-tuning (LoRA), on the same images.
# So few images and steps say that it runs, not who wins: for figures see docs/baselines.md.
# Needs `pip install 'sauce-hooks[baselines]'`.

# %%
import sauce_hooks as sh
from sauce_hooks.evaluation.baselines import Materials, Settings, forget_retain, make_methods
from sauce_hooks.evaluation.probes import Probe

model, processor, sae = sh.scenes.load()
CONCEPT, DOMAIN = "tiger", sh.scenes.DOMAINS[sh.scenes.domain_of("tiger")]

# %% [markdown]
# What each method learns from: images with and without the concept, and for fine-tuning questions with true answers.

# %%
N = 32
holding = sh.scenes.sample(N, seed=1, contains=CONCEPT, split="train")
siblings = [
    s for name in DOMAIN if name != CONCEPT for s in sh.scenes.sample(4, seed=2, contains=name, lacks=CONCEPT, split="train")
]
captions = {id(scene.image): scene.caption for scene in (*holding, *siblings)}


def probes(scenes: list[sh.scenes.Scene]) -> list[Probe]:
    return [Probe(scene.image, scene.concepts) for scene in scenes]


training = forget_retain(
    CONCEPT,
    probes(holding),
    probes(siblings),
    DOMAIN,
    sh.scenes.wording(),
    describe=lambda shown: [captions[id(probe.image)] for probe in shown],
)
given = Materials(
    model,
    processor,
    sae,
    sets=lambda concept: ([s.image for s in holding], [s.image for s in siblings]),
    data=lambda concept: training,
    settings={"GD": Settings(lr=1e-2, steps=8, batch_size=8)},
    instruction="please tell no {}.",  # the bundled model has few words
)

# %%
methods = {"SAUCE": lambda concept: sh.ConceptEraser(model, sae, [concept])}
methods |= make_methods(given, ["GD", "difference of means", "prompt only"])
results = sh.evaluate(
    model, sae, sh.scenes.probes(8, retained=1), [CONCEPT], processor=processor, methods=methods, progress=False
)
table = results.to_frame().pivot(index="method", columns="metric", values="value")
print(table[["UA_d", "UA_g", "IRA", "SRA"]].mul(100).round(0).to_string())
