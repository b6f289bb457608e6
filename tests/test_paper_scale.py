"""A configuration for a real model becomes a study: every shipped one with its own classes at small size, and offline."""

import hashlib
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sauce_hooks import Eligibility, VisionSAE, evaluate
from sauce_hooks.errors import ConfigError, EvaluationWarning, ImagesError, ResumeError
from sauce_hooks.evaluation.labelled import split_of
from sauce_hooks.evaluation.wordings import CHINESE
from sauce_hooks.reproduce import preparing
from sauce_hooks.reproduce.collected import Collection, Pool, class_numbers, collect
from sauce_hooks.reproduce.config import configs, find, read
from sauce_hooks.reproduce.paper import paper, prepare
from sauce_hooks.reproduce.sharing import share
from sauce_hooks.scenes import asset, sample
from tiny import build_llava, build_processor, weights

TABLE = {
    "domains": [
        {
            "name": "object",
            "task": "concrete",
            "concepts": ["tiger", "cat"],
            "imagenet": {"tiger": {"n02129604": 292}, "cat": {"n02123045": 281, "n02123159": 282}},
        },
        {"name": "sport", "task": "concrete", "concepts": ["soccer", "tennis"]},
        {"name": "color", "task": "abstract", "concepts": ["red", "blue"]},
    ]
}
SIX = ("tiger", "cat", "soccer", "tennis", "red", "blue")


# A TOML file from plain values, as the standard library writes none.


def plain(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {plain(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(plain, value)) + "]"
    return json.dumps(value)


def write(path, content):
    path.write_text("".join(f"{key} = {plain(value)}\n" for key, value in content.items()))
    return path


# Images: ImageNet's thousand classes on disk with a handful of pictures, and folders of the rest.


def by_row(digest):
    """A training row's place, as `collected` has it."""
    return "val" if int(digest[:12], 16) / 16**12 < 0.25 else "train"


def drawn(split, quota, concept, seed, place):
    """PNG files of scenes with a concept, of which so many belong to each place by their digests."""
    kept, left = [], dict(quota)
    for scene in sample(100, seed=seed, contains=concept, split=split):
        file = io.BytesIO()
        scene.image.save(file, "PNG")
        where = place(hashlib.sha256(file.getvalue()).hexdigest())
        if left.get(where):
            left[where] -= 1
            kept.append(file.getvalue())
        if not any(left.values()):
            return kept
    raise AssertionError(left)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    import datasets

    root = tmp_path_factory.mktemp("images")
    names = [f"class {i}" for i in range(1000)]
    names[281], names[282], names[292] = "tabby, tabby cat", "tiger cat", "tiger, Panthera tigris"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})

    def rows(kind, quota, concept, label, seed):
        return [{"image": {"bytes": png, "path": None}, "label": label} for png in drawn(kind, quota, concept, seed, by_row)]

    splits = {}
    for split, kind, quota in (("train", "train", {"train": 9, "val": 3}), ("validation", "test", {"train": 6})):
        found = [*rows(kind, quota, "tiger", 292, 900_000), *rows(kind, quota, "cat", 281, 900_001)]
        found = [{**row, "label": 282} if row["label"] == 281 and i % 2 else row for i, row in enumerate(found)]
        found += rows(kind, {"train": 3}, "fish", 7, 900_002)
        splits[split] = datasets.Dataset.from_list(found, features=features)
    datasets.DatasetDict(splits).save_to_disk(root / "imagenet")
    for domain in TABLE["domains"][1:]:
        for concept in domain["concepts"]:
            folder = root / "web" / domain["name"] / concept
            folder.mkdir(parents=True)
            pngs = drawn("test", {"train": 9, "val": 3, "test": 6}, concept, 900_100, split_of)
            for i, png in enumerate(pngs):
                (folder / f"{i}.png").write_bytes(png)
    return root


# The three shipped families, tiny, with processors, as folders.

TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}{% if part.type == 'image' %}IMAGE{% else %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endfor %} assistant:"
)
VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "image_size": 16, "patch_size": 4}
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def llava():
    processor = build_processor()
    return build_llava(len(processor.tokenizer)), processor


def mllama():
    import transformers as tf
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    tokenizer = build_processor().tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image|>", "<|python_tag|>"]})
    pictures = MllamaImageProcessorPil(size={"height": 16, "width": 16}, max_image_tiles=2)
    processor = tf.MllamaProcessor(pictures, tokenizer, chat_template=TEMPLATE.replace("IMAGE", "<|image|>"))
    vision = MllamaVisionConfig(
        **VIT, attention_heads=4, num_global_layers=2, max_num_tiles=2, intermediate_layers_indices=[1, 2],
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]], vision_output_dim=96,
    )  # fmt: skip
    text = MllamaTextConfig(**{**TEXT, "num_hidden_layers": 3}, vocab_size=len(tokenizer), cross_attention_layers=[1])
    config = tf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=processor.image_token_id)
    return shaken(tf.MllamaForConditionalGeneration(config)), processor


def idefics3():
    import transformers as tf
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = build_processor().tokenizer
    tiles = [f"<row_{r + 1}_col_{c + 1}>" for r in range(2) for c in range(2)]
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *tiles]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    pictures = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = tf.Idefics3Processor(
        pictures, tokenizer, image_seq_len=4, chat_template=TEMPLATE.replace("IMAGE", "<image>")
    )
    vision = Idefics3VisionConfig(**VIT, num_attention_heads=4)
    text = tf.LlamaConfig(**TEXT, vocab_size=len(processor.tokenizer))
    config = tf.Idefics3Config(
        vision_config=vision, text_config=text, image_token_id=processor.image_token_id, scale_factor=2, pad_token_id=0
    )
    return shaken(tf.Idefics3ForConditionalGeneration(config)), processor


def shaken(model):
    """Every weight off its initial value: gates start at zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


SHIPPED = {"llava-1.5-7b": llava, "llama-3.2-11b-vision": mllama, "smolvlm-256m": idefics3}
CLASSES = {
    "llava-1.5-7b": "LlavaForConditionalGeneration",
    "llama-3.2-11b-vision": "MllamaForConditionalGeneration",
    "smolvlm-256m": "Idefics3ForConditionalGeneration",
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Folders in the place of ids on the hub, made when asked for."""
    root = tmp_path_factory.mktemp("hub")

    def folder(name):
        if not (root / name).exists():
            model, processor = SHIPPED[name]()
            model.save_pretrained(root / name)
            processor.save_pretrained(root / name)
        return str(root / name)

    return folder


def small(name, images, hub, folder, /, **changes):
    """A shipped configuration with everything made small; what is not named here is as it ships."""
    content = tomllib.loads(find(name).read_text())
    table = write(folder / "table.toml", TABLE)
    content |= {"concepts": str(table), "batch_size": 8, "relatives": [], "size": {"n": 2, "retained": 1, "merged": [1, 2]}}
    content["model"] |= {"id": hub(name), "dtype": "float32"}
    content["sae"] |= {"dataset": str(images / "imagenet"), "n_images": 27, "workers": 0}
    content["sae"]["tokens"] |= {"per_image": 8}
    content["sae"]["changes"] |= {"expansion": 2, "epochs": 1, "batch_size": 32, "options": {"k": 4}}
    content["objects"] |= {"dataset": str(images / "imagenet")}
    content["images"] |= {"folder": str(images / "web"), "training": 8, "test": 4, "least": 2, "absent": ["object", "sport"]}
    content["learning"] = {"how": "paper", "k": 4, "negatives": 8}
    content["questions"] |= {"max_new_tokens": 4}
    content["rivals"] |= {"methods": ["GA"], "rates": {"GA": 1e-3}}
    content["rivals"]["settings"] |= {"steps": 1, "batch_size": 2, "rank": 2}
    content |= changes
    return write(folder / f"{name}.toml", content)


# What ships. ----------------------------------------------------------------------------------------------------------


def test_the_shipped_configurations_are_of_the_papers_sixty_concepts():
    assert set(configs()) == set(SHIPPED)
    for name in configs():
        protocol = read(name)
        domains = {domain.name: domain for domain in protocol.domains}
        assert {n: len(d.concepts) for n, d in domains.items()} == {
            "object": 20, "sport": 10, "color": 10, "emotion": 10, "material": 10
        }  # fmt: skip
        assert {concept for domain in protocol.domains for concept in domain.concepts} == set(CHINESE)
        assert (protocol.images.training, protocol.images.test, protocol.size.n) == (200, 50, 50)
        numbers = [(synset, number) for found in domains["object"].imagenet.values() for synset, number in found.items()]
        assert len(numbers) == len(set(numbers)) == 40
        assert sorted(numbers) == sorted(numbers, key=lambda pair: pair[1])  # the classes are sorted by synset


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_configuration_runs_with_its_own_classes(name, images, hub, tmp_path):
    config, out = small(name, images, hub, tmp_path), tmp_path / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare(config, out, progress=False)
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    prepare(config, out, progress=False)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == made  # all is there already

    study = pickle.loads(pickle.dumps(paper(config, out)))()
    assert type(study.model).__name__ == CLASSES[name]
    assert study.concepts == SIX
    assert study.tasks == {"concrete": SIX[:4], "abstract": SIX[4:]}
    assert set(SIX) <= set(study.sae.concepts)
    assert (study.sae.hook_point.layer, study.sae.hook_point.n_layers) == (2, 4)  # the penultimate block
    before, modules = weights(study.model), [type(module) for module in study.model.modules()]
    options = {"processor": study.processor, "judge": study.judge, "batch_size": 8, "progress": False}
    results = evaluate(
        study.model, study.sae, study.probes(2, 1), ["tiger"], methods=study.methods(), eligibility=None,
        out=out / "answers", **options,
    )  # fmt: skip
    assert [method for method, _ in results.scores] == ["original model", "SAUCE", "GA"]
    assert not results.failures
    assert results.scores["SAUCE", "tiger"]["UA_d"].n == 2
    assert [type(module) for module in study.model.modules()] == modules  # no adapter stays
    assert all(torch.equal(tensor, before[name]) for name, tensor in study.model.state_dict().items())
    assert list(out.glob("descriptions/*/*.txt"))
    assert list(out.glob("weights/*.safetensors"))
    assert set(study.attacks()) == set(read(config).attacks.names)


# The bundled model by a configuration: what must be true of a model that knows something. ------------------------------


def bundled(images, folder, /, **changes):
    content = {
        "name": "bundled", "concepts": str(write(folder / "table.toml", TABLE)), "batch_size": 32,
        "model": {"id": str(asset("model"))}, "sae": {"source": str(asset("sae"))},
        "objects": {"dataset": str(images / "imagenet")},
        "images": {"folder": str(images / "web"), "training": 12, "test": 6, "least": 2, "absent": ["object", "sport"]},
        "questions": {"max_new_tokens": 24}, "rivals": {"methods": []}, "learning": {"how": "paper", "k": 16, "gamma": -1.5},
    }  # fmt: skip
    return write(folder / "bundled.toml", content | changes)


def test_the_bundled_model_by_a_configuration_forgets_tiger(images, tmp_path):
    sae = VisionSAE.load(asset("sae"))
    del sae.concepts["cat"]
    sae.save(tmp_path / "sae")
    config = bundled(images, tmp_path, sae={"source": str(tmp_path / "sae")})
    prepare(config, tmp_path / "out", progress=False)
    study = paper(config, tmp_path / "out")()
    assert len(list((tmp_path / "out/concepts").glob("*/bank/concepts.json"))) == 1  # "cat", which the bank lacked
    results = evaluate(
        study.model, study.sae, study.probes(5, 2), ["tiger", "cat"], processor=study.processor, judge=study.judge,
        methods=study.methods(), progress=False, batch_size=32, eligibility=Eligibility(0.0),
    )  # fmt: skip
    before, after = (results.scores[method, "tiger"] for method in ("original model", "SAUCE"))
    assert before["UA_d"].value <= 0.2 < 0.8 <= after["UA_d"].value
    assert before["UA_g"].value <= 0.2 < 0.8 <= after["UA_g"].value
    assert after["CRA"].value >= 0.8
    assert results.scores["SAUCE", "cat"]["UA_d"].value > results.scores["original model", "cat"]["UA_d"].value


# Images. --------------------------------------------------------------------------------------------------------------


def test_images_are_of_one_split_each_and_absent_only_where_that_is_declared(images, tmp_path):
    protocol = read(bundled(images, tmp_path))
    collection = collect(protocol)
    collection.save(tmp_path / "images.json")
    assert Collection.load(tmp_path / "images.json") == collection
    pool = Pool.of(protocol, collection, {})
    assert pool.concepts == SIX
    for concept in SIX:
        training, test = pool.holding(concept), pool.holding(concept, ["test"])
        assert 2 <= len(training) <= 12
        assert 2 <= len(test) <= 6
        assert not {p.name for p in training} & {p.name for p in test}
        assert training[0].image.mode == "RGB"
    assert len(pool.holding("tiger")) == 12
    tiger, red = pool.holding("tiger")[0], pool.holding("red")[0]
    assert tiger.lacks("cat")
    assert not tiger.lacks("red")
    assert not red.lacks("blue")  # colours mix
    others = pool.others("tiger", pool.concepts, 9)
    assert len(others) == 9
    assert not any("tiger" in probe.concepts for probe in others)
    drawn = pool.training(preparing.words(protocol, build_processor()), ["tiger"])
    assert drawn.negatives["tiger"]
    assert all(probe.lacks("tiger") for probe in drawn.negatives["tiger"])


def test_a_concept_with_too_few_images_is_left_out_and_a_task_without_any_is_an_error(images, tmp_path):
    table = {"domains": [*TABLE["domains"][:2], {**TABLE["domains"][2], "concepts": ["red", "mauve"]}]}
    config = bundled(images, tmp_path, concepts=str(write(tmp_path / "more.toml", table)))
    prepare(config, tmp_path / "out", progress=False)
    with pytest.warns(EvaluationWarning, match=r"mauve \(0 training and 0 test images in .*web/color"):
        study = paper(config, tmp_path / "out")()
    assert study.tasks["abstract"] == ("red",)
    assert "mauve" not in study.probes(1, 1).concepts

    table["domains"][2] |= {"concepts": ["mauve", "taupe"]}
    write(tmp_path / "more.toml", table)
    with pytest.raises(ImagesError, match=r"no abstract concept has enough images.*mauve: 0 training.*web/color"):
        prepare(config, tmp_path / "none", progress=False)


def test_classes_are_found_by_synset_or_by_number_and_another_order_is_noticed():
    from datasets import ClassLabel, Value

    synsets = {"n02129604": 292}
    assert class_numbers(ClassLabel(names=["n02123045", "n02129604"]), synsets, "tiger") == [1]
    assert class_numbers(Value("int64"), synsets, "tiger") == [292]
    right = [f"class {i}" for i in range(1000)]
    right[292] = "tiger, Panthera tigris"
    assert class_numbers(ClassLabel(names=right), synsets, "tiger") == [292]
    with pytest.raises(ConfigError, match="'tiger' is class 292 of ImageNet-1k, which this dataset calls 'class 291'"):
        class_numbers(ClassLabel(names=["first", *right[:-1]]), synsets, "tiger")
    with pytest.raises(ConfigError, match="it has 10 classes"):
        class_numbers(ClassLabel(names=right[:10]), synsets, "tiger")


# What is wrong is said. -------------------------------------------------------------------------------------------------

WRONG = {
    r"sae\.presett: no such key.*Did you mean preset\?": ('preset = "batchtopk"', 'presett = "batchtopk"'),
    r"size\.n: .*valid integer; found '50'": ("n = 50", 'n = "50"'),
    r"sae: unknown preset 'topp'": ('preset = "batchtopk"', 'preset = "topp"'),
    r"sae: changes: a preset has no expansoin": ("expansion", "expansoin"),
    r"relatives\.1\.expected: .*'transfers' or 'ruined'": ('"ruined"', '"lost"'),
    r"model is missing; modell: no such key": ("[model]", "[modell]"),
    r"sae\.tokens\.per_imag: no such key": ("per_image", "per_imag"),
    r'needs questions\.second_language, such as "zh"': ('second_language = "zh"', ""),
    r"unknown method 'GAA'": ('"GA"', '"GAA"'),
    r"no learning rate for GA, GD, KL, PO": ("tried = [3e-5, 1e-4, 3e-4, 1e-3]", ""),
    r"rivals\.swept: 'dragon' is no concept": ('swept = ["tiger"', 'swept = ["dragon"'),
    r"images\.absent: no domain 'colour'": ('absent = ["object"', 'absent = ["colour"'),
    r"images\.training: .*greater than or equal to 1": ("training = 200", "training = 0"),
    r"images\.folder: where the images of sport": ('folder = "images"', ""),
    r"concepts = 'table2'.*no such file": ('"table1"', '"table2"'),
    r"cannot be read as TOML": ("[model]", "[model"),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_configuration_says_where(said, tmp_path):
    text = find("llava-1.5-7b").read_text()
    right, wrong = WRONG[said]
    assert right in text
    (tmp_path / "mine.toml").write_text(text.replace(right, wrong, 1))
    with pytest.raises(ConfigError, match=said):
        read(tmp_path / "mine.toml")


def test_what_is_not_there_is_named_with_where_it_was_looked_for(images, tmp_path):
    with pytest.raises(ConfigError, match=r"give one of .*llava-1\.5-7b.*Did you mean llava-1\.5-7b"):
        read("llava-1.5")
    cases = {
        r"no folder .*/nowhere": {"images": {"folder": str(tmp_path / "nowhere")}},
        r"the split 'train' of 'no/such' cannot be read": {"objects": {"dataset": "no/such"}},
        r"(?s)the model 'no/such' cannot be loaded.*hf auth login": {"model": {"id": "no/such"}},
        r"sae\.source: 'no/such' is no SAE": {"sae": {"source": "no/such"}},
    }
    for i, (said, changes) in enumerate(cases.items()):
        with pytest.raises(ConfigError, match=said):
            prepare(bundled(images, tmp_path, **changes), tmp_path / f"out{i}", progress=False)
    with pytest.raises(ResumeError, match="prepare"):
        paper(bundled(images, tmp_path), tmp_path / "fresh")()


def test_a_folder_of_another_configuration_is_refused(images, tmp_path):
    config = bundled(images, tmp_path)
    prepare(config, tmp_path / "out", progress=False)
    bundled(images, tmp_path, learning={"how": "paper", "k": 8})
    with pytest.raises(ResumeError, match=r"another configuration: learning.*k was 16, is 8"):
        prepare(config, tmp_path / "out", progress=False)
    with pytest.raises(ResumeError, match="another configuration"):
        paper(config, tmp_path / "out")()


# Resuming, learning rates, several processes. ---------------------------------------------------------------------------


def test_a_preparation_that_was_ended_goes_on_with_what_is_left(images, tmp_path, monkeypatch):
    sae = VisionSAE.load(asset("sae"))
    for concept in ("tiger", "cat"):
        del sae.concepts[concept]
    sae.save(tmp_path / "sae")
    config, out = bundled(images, tmp_path, sae={"source": str(tmp_path / "sae")}), tmp_path / "out"
    learn, asked = preparing.learn_concept, []

    def ended(model, sae, name, *sets, **options):
        asked.append(name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return learn(model, sae, name, *sets, **options)

    monkeypatch.setattr(preparing, "learn_concept", ended)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, out, progress=False)
    prepare(config, out, progress=False)
    assert asked == ["tiger", "cat", "cat"]


def test_a_learning_rate_is_chosen_on_images_that_are_not_trained_on(images, tmp_path):
    rivals = {
        "methods": ["GA"], "tried": [1e-5, 1e-2], "swept": ["tiger"], "settings": {"steps": 1, "batch_size": 2, "rank": 2}
    }  # fmt: skip
    config = bundled(images, tmp_path, rivals=rivals, images={
        "folder": str(images / "web"), "training": 12, "test": 6, "least": 1, "absent": ["object", "sport"]
    })  # fmt: skip
    prepare(config, tmp_path / "out", progress=False)
    (found,) = (json.loads(path.read_text()) for path in (tmp_path / "out/rates").glob("*.json"))
    assert set(found["merits"]) == {"1e-05", "0.01"}
    assert found["lr"] == float(max(found["merits"], key=found["merits"].get))
    study = paper(config, tmp_path / "out")()
    assert study.methods()["GA"].settings.lr == found["lr"]
    described = {path.stem for path in (tmp_path / "out/descriptions").rglob("*.txt")}
    pool = Pool.of(read(config), Collection.load(tmp_path / "out/images.json"), {})
    assert described
    for concept in pool.concepts:
        assert not described & {probe.name for probe in pool.holding(concept, ["val", "test"])}


@given(names=st.lists(st.text(min_size=1, max_size=5), unique=True, max_size=6), n_done=st.integers(0, 6))
def test_shared_work_is_done_once(names, n_done, tmp_path_factory):
    folder, asked = tmp_path_factory.mktemp("shared"), []

    def path_of(name):
        return folder / str(names.index(name)) / "done"

    def work(name):
        asked.append(name)
        path_of(name).touch()

    share(names[:n_done], path_of, work)
    share(names, path_of, work)
    assert sorted(asked) == sorted(names)


SCRIPT = """
import os, sys, warnings
from sauce_hooks.activations import World
from sauce_hooks.reproduce import preparing
from sauce_hooks.reproduce.paper import paper, prepare

warnings.simplefilter("ignore")
world, learn = World.current(), preparing.learn_concept
assert world.size == 2

def counted(model, sae, name, *sets, **options):
    open(sys.argv[2] + f".learnt-{name}-{world.rank}", "w").close()
    return learn(model, sae, name, *sets, **options)

preparing.learn_concept = counted
prepare(sys.argv[1], sys.argv[2], progress=False)
study = paper(sys.argv[1], sys.argv[2])()
known = world.objects((sorted(study.sae.concepts), repr(study.sae.record())))
assert known[0] == known[1], known
os.write(1, f"studied {world.rank} {len(study.concepts)}\\n".encode())  # whole, though two processes write
"""


@pytest.mark.slow
def test_processes_of_accelerate_train_one_sae_and_share_the_concepts(images, hub, tmp_path):
    config = small("llava-1.5-7b", images, hub, tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    source = Path(preparing.__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_machines",
        "1",
        "--num_processes",
        "2",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    run = subprocess.run(
        [*launch, str(tmp_path / "script.py"), str(config), str(tmp_path / "out")],
        env=env, cwd=tmp_path, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert sorted(line for line in run.stdout.splitlines() if line.startswith("studied")) == ["studied 0 6", "studied 1 6"]
    learnt = sorted(path.name.split("-")[1] for path in tmp_path.glob("out.learnt-*"))
    assert learnt == sorted(SIX)  # each by one process
    assert len(list((tmp_path / "out").glob("sae/vision_sae.json"))) == 1
