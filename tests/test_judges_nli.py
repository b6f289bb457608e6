"""The NLI judge, on a tiny model with random weights that is saved to a folder and loaded from it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from sauce_hooks.errors import JudgeError
from sauce_hooks.evaluation.judges import NLI, Judge
from sauce_hooks.evaluation.judges.nli import hypothesis

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "the", "image", "shows", "tiger", "dog", "grass", ".", "on"]
LABELS = {0: "contradiction", 1: "entailment", 2: "neutral"}
TEXTS = ["a tiger on the grass .", "a dog", "the image shows a dog on the grass .", "grass " * 200 + "tiger"]


@pytest.fixture
def tokenizer() -> Any:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def tiny(labels: dict[int, str] = LABELS) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, num_labels=len(labels), id2label=labels, label2id={v: k for k, v in labels.items()},
        initializer_range=0.5,
    )  # fmt: skip
    return BertForSequenceClassification(config)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any) -> Path:
    tiny().save_pretrained(tmp_path / "my-nli")
    tokenizer.save_pretrained(tmp_path / "my-nli")
    return tmp_path / "my-nli"


def test_from_a_folder_it_says_what_the_model_says(folder: Path, tokenizer: Any):
    judge = NLI.load(folder)
    assert isinstance(judge, Judge)
    assert judge.name == "nli-1 my-nli, unsure 0.3 to 0.7, 'The image shows a X.'"
    model = tiny().eval()
    for text, found in zip(TEXTS[:3], judge.entailment(TEXTS[:3], "tiger").tolist(), strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(text, "The image shows a tiger.", return_tensors="pt")).logits
        assert found == pytest.approx(float(logits.softmax(-1)[0, 1]), abs=1e-5)


def test_batches_and_order_change_nothing(folder: Path):
    one, many = NLI.load(folder, batch_size=1), NLI.load(folder, batch_size=8)
    torch.testing.assert_close(one.entailment(TEXTS, "tiger"), many.entailment(TEXTS, "tiger"))
    torch.testing.assert_close(one.entailment(TEXTS[::-1], "tiger"), many.entailment(TEXTS, "tiger").flip(0))
    assert many([], "tiger") == []


def test_nothing_of_a_long_description_is_lost(folder: Path):
    """It is judged in pieces that the model can read, and the one that entails most decides."""
    judge, model = NLI.load(folder), tiny().eval()
    pieces = [piece for _, piece in judge._pieces([TEXTS[3]], "tiger")]
    assert len(pieces) > 3
    assert max(len(piece["input_ids"]) for piece in pieces) <= 64
    read = [piece["input_ids"][1 : piece["input_ids"].index(WORDS.index("[SEP]"))] for piece in pieces]
    assert set().union(*read) == {WORDS.index("grass"), WORDS.index("tiger")}
    assert read[-1][-1] == WORDS.index("tiger")
    with torch.no_grad():
        each = [
            model(**{k: torch.tensor([v]) for k, v in piece.items()}).logits.softmax(-1)[0, 1].item() for piece in pieces
        ]
    assert judge.entailment([TEXTS[3]], "tiger").item() == pytest.approx(max(each), abs=1e-5)


def test_between_the_bounds_it_is_unsure(folder: Path):
    sure = NLI.load(folder, unsure=(0.5, 0.5))
    doubt = NLI.load(folder, unsure=(0.0, 1.0))
    assert doubt.verdicts(TEXTS, "tiger") == [None] * 4
    assert doubt(TEXTS, "tiger") == [True] * 4
    assert sure.verdicts(TEXTS, "tiger") == [p >= 0.5 for p in sure.entailment(TEXTS, "tiger").tolist()]
    for bounds in ((0.7, 0.3), (-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError, match="two probabilities"):
            NLI.load(folder, unsure=bounds)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_entailment_is_found_by_name(place: int, tokenizer: Any):
    labels = ["NEUTRAL", "CONTRADICTION"]
    labels.insert(place, "ENTAILMENT")
    model = tiny(dict(enumerate(labels)))
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.nn.functional.one_hot(torch.tensor(place), 3) * 10.0)
    assert NLI(model, tokenizer).verdicts(TEXTS, "tiger") == [True] * 4


@pytest.mark.parametrize("labels", [{0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}, {0: "positive", 1: "negative"}])
def test_without_such_a_label_it_refuses(labels: dict[int, str], tokenizer: Any):
    with pytest.raises(JudgeError, match="id2label"):
        NLI(tiny(labels), tokenizer)


def test_not_entailment_is_not_taken_for_it(tokenizer: Any):
    model = tiny({0: "not_entailment", 1: "entailment"})
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([10.0, 0.0]))
    assert NLI(model, tokenizer).verdicts(TEXTS, "tiger") == [False] * 4


def test_a_folder_without_a_model_is_refused(tmp_path: Path, folder: Path):
    with pytest.raises(JudgeError, match="no folder"):
        NLI.load(tmp_path / "none")
    with pytest.raises(JudgeError, match="no NLI model"):
        NLI.load(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(tiny().state_dict(), folder / "pytorch_model.bin")  # a pickle: never read
    with pytest.raises(JudgeError, match="no NLI model"):
        NLI.load(folder)


def test_a_hypothesis_too_long_for_the_model_is_refused(folder: Path):
    with pytest.raises(JudgeError, match="shorten it"):
        NLI.load(folder)(["a dog"], "tiger " * 60)


@pytest.mark.parametrize(
    ("concept", "said"),
    [
        ("tiger", "The image shows a tiger."),
        ("envelope", "The image shows an envelope."),
        ("golf", "The image shows golf."),
        ("red", "Something in the image is red."),
        ("bored", "Someone in the image is bored."),
        ("wood", "Something in the image is made of wood."),
        ("zebra", "The image shows a zebra."),
    ],
)
def test_the_hypothesis_suits_the_domain(concept: str, said: str):
    assert hypothesis(concept) == said
