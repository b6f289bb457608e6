# %% [markdown]
# # Serving: each row of a batch forgets what its user asked for
# One request brings several images, each with what is to be forgotten; words come back as they are generated, a JSON line
# for each step. Needs `pip install 'sauce-hooks[examples]'`.

# %%
import base64
import io
import json
import queue
import threading
from collections.abc import Iterable
from itertools import islice

from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from pydantic import BaseModel

import sauce_hooks as sh

model, processor, sae = sh.scenes.load()
one_at_a_time = threading.Lock()
app = FastAPI()  # `uvicorn serving:app`


class Row(BaseModel):
    image: str  # base64
    forget: list[str] = []


class Words(queue.Queue):  # transformers' own streamer takes one row only
    def end(self) -> None:
        pass


def generate(inputs: dict, words: Words) -> None:
    try:
        model.generate(**inputs, streamer=words, do_sample=False)
    finally:
        words.put(None)  # also after an error: nobody waits for ever


@app.post("/describe")
def describe(rows: list[Row]) -> Iterable[list[str]]:
    images = [Image.open(io.BytesIO(base64.b64decode(row.image))) for row in rows]
    inputs = processor(images=images, text=[sh.scenes.describe_prompt()] * len(rows), return_tensors="pt", padding=True)
    words = Words()
    with one_at_a_time, sh.ConceptEraser(model, sae, []).for_rows([row.forget for row in rows]):
        thread = threading.Thread(target=generate, args=(inputs, words))
        thread.start()  # an eraser of scope "model", the default, reaches it
        try:
            for ids in islice(iter(words.get, None), 1, None):  # the first is the prompt
                yield [processor.decode([i], skip_special_tokens=True) for i in ids]
        finally:
            thread.join()  # the eraser stays on until the last word, whoever has gone


# %%
if __name__ == "__main__":
    scene = next(s for s in sh.scenes.sample(300, seed=2, contains="tiger") if "red" in s.concepts)
    scene.image.save(file := io.BytesIO(), "png")
    image = base64.b64encode(file.getvalue()).decode()
    users = ([], ["red"], ["tiger"])
    with TestClient(app).stream("POST", "/describe", json=[{"image": image, "forget": user} for user in users]) as reply:
        columns = list(zip(*map(json.loads, filter(None, reply.iter_lines())), strict=True))
    for user, words in zip(users, columns, strict=True):
        print(f"forget {', '.join(user) or 'nothing'}:", " ".join(filter(None, words)))
