# %% [markdown]
# # Serving: each row of a batch forgets what its user asked for
# A small FastAPI app. One request brings several images, each with what is to be forgotten; the words come back as they
# are generated, one JSON line for each. Needs `pip install 'sauce-hooks[examples]'`; serve it with `uvicorn serving:app`.

# %%
import base64
import io
import json
import queue
import threading
from collections.abc import Iterator

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from PIL import Image
from pydantic import BaseModel
from transformers.generation.streamers import BaseStreamer

import sauce_hooks as sh

model, processor, sae = sh.scenes.load()
one_at_a_time = threading.Lock()  # rows of one batch differ; two batches at once would have to be one


class Row(BaseModel):
    image: str  # base64
    forget: list[str] = []


class Words(queue.Queue, BaseStreamer):  # transformers' own streamer takes one row only
    def end(self) -> None:
        self.put(None)


def answers(rows: list[Row]) -> Iterator[str]:
    images = [Image.open(io.BytesIO(base64.b64decode(row.image))) for row in rows]
    prompts = [sh.scenes.describe_prompt()] * len(rows)
    inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True)
    words = Words()
    with one_at_a_time, sh.ConceptEraser(model, sae, []).for_rows([row.forget for row in rows]):
        thread = threading.Thread(target=model.generate, kwargs={**inputs, "streamer": words, "do_sample": False})
        thread.start()  # an eraser of scope "model", the default, reaches it
        words.get()  # the prompt
        for ids in iter(words.get, None):
            yield json.dumps([processor.decode([i], skip_special_tokens=True) for i in ids]) + "\n"
        thread.join()


app = FastAPI()


@app.post("/describe")
def describe(rows: list[Row]) -> StreamingResponse:
    return StreamingResponse(answers(rows), media_type="application/x-ndjson")


# %%
scene = next(s for s in sh.scenes.sample(300, seed=2, contains="tiger") if "red" in s.concepts)
scene.image.save(file := io.BytesIO(), "png")
image = base64.b64encode(file.getvalue()).decode()
users = ([], ["red"], ["tiger"])
with TestClient(app).stream("POST", "/describe", json=[{"image": image, "forget": user} for user in users]) as reply:
    columns = zip(*map(json.loads, reply.iter_lines()), strict=True)
for user, words in zip(users, columns, strict=True):
    print(f"forget {', '.join(user) or 'nothing'}:", " ".join(filter(None, words)))
