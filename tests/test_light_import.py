import subprocess
import sys

import pytest

import sauce_hooks

HEAVY = [
    "transformers",
    "sae_lens",
    "transformer_lens",
    "nnsight",
    "datasets",
    "wandb",
    "matplotlib",
    "pandas",
    "statsmodels",
]


def test_importing_the_library_imports_nothing_heavy():
    code = f"import sys, sauce_hooks; print(*(name for name in {HEAVY} if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


@pytest.mark.parametrize("name", sauce_hooks.__all__)
def test_every_public_name_is_there_and_listed(name):
    assert getattr(sauce_hooks, name) is not None
    assert name in dir(sauce_hooks)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = sauce_hooks.no_such_thing
