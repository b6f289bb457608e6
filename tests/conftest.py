"""Fixtures: a fresh tiny model for every test, cold (never run) or warm (transformers' recording hooks installed)."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from tiny import build_llava, build_processor, logits, make_vision_sae, model_inputs

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)

settings.register_profile(
    "fast",
    deadline=None,
    max_examples=25,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("fast")


@pytest.fixture(scope="session")
def processor() -> Any:
    return build_processor()


@pytest.fixture(scope="session")
def _llava(processor: Any) -> Any:
    return build_llava(len(processor.tokenizer))


@pytest.fixture
def cold(_llava: Any) -> Any:
    """A model that has never run."""
    return copy.deepcopy(_llava)


@pytest.fixture
def model(cold: Any) -> Any:
    """A model that has run, hidden states recorded."""
    logits(cold)
    with torch.no_grad():
        cold(**model_inputs(), output_hidden_states=True)
        cold.generate(**model_inputs(), max_new_tokens=2, do_sample=False)
    return cold


@pytest.fixture(params=["cold", "warm"])
def any_model(request: pytest.FixtureRequest) -> Any:
    """Either."""
    return request.getfixturevalue("cold" if request.param == "cold" else "model")


@pytest.fixture
def sae(model: Any) -> Any:
    return make_vision_sae(model)
