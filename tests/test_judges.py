"""The lexicon, agreement with labels, judges in layers."""

import json
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sauce_hooks.errors import JudgeFileError, UnjudgedAnswersWarning
from sauce_hooks.evaluation.judges import Agreement, Case, Judge, Layered, Lexicon, agreement, labelled
from sauce_hooks.evaluation.judges.__main__ import BareName, main
from sauce_hooks.scenes.language import FRENCH, LANGUAGES, caption
from sauce_hooks.scenes.world import CONCEPTS, sample

TABLE_1 = {
    "object": "bulbul boat sweatshirt wall_clock cannon wok cat tiger starfish langur bookcase chain chest crib desk dome "
    "envelope car microphone necklace",
    "sport": "soccer basketball football tennis baseball volleyball golf hockey rugby badminton",
    "color": "red blue green yellow purple orange pink brown black white",
    "emotion": "happy sad angry surprised scared disgusted excited relaxed confused bored",
    "material": "wood metal plastic glass fabric paper ceramic leather concrete stone",
}
lexicon = Lexicon()


def says(text: str, concept: str) -> bool | None:
    return lexicon.verdicts([text], concept)[0]


def test_it_knows_every_concept_of_the_paper_and_of_the_bundled_world():
    paper = [concept for names in TABLE_1.values() for concept in names.split()]
    assert len(paper) == 60
    assert all(lexicon.known(concept) for concept in (*paper, *CONCEPTS))
    assert not lexicon.known("zebra")


@pytest.mark.parametrize("language", LANGUAGES)
def test_it_reads_every_true_caption_of_the_bundled_world_right(language: Any):
    scenes = sample(40, seed=11, split="val")
    texts = [caption(scene, language) for scene in scenes]
    for concept in CONCEPTS:
        assert lexicon.verdicts(texts, concept) == [concept in scene.concepts for scene in scenes]


@pytest.mark.parametrize("concept", CONCEPTS)
def test_it_reads_the_bare_names_and_their_denial(concept: str):
    french = FRENCH[concept]
    assert says(f"The image shows {concept}, and it is large.", concept) is True
    assert says(f"There is no {concept} in the image.", concept) is False
    assert says(f"Il n'y a pas de {french} dans cette image.", concept) is False
    assert says("The picture shows a large empty field with some clouds.", concept) is False


@pytest.mark.parametrize(
    ("text", "concept", "said"),
    [
        ("Tigers!", "tiger", True),
        ("A TIGER'S HEAD", "Tiger", True),
        ("A wall‑clock from 1900.", "wall_clock", True),
        ("Ｔｉｇｅｒ on the wall", "tiger", True),
        ("It isn’t red.", "red", False),
        ("It isn't red but blue.", "blue", True),
        ("No cars, bicycles or boats can be seen.", "boat", False),
        ("There are no people, and a boat lies on the beach.", "boat", True),
        ("There are no people on the boat.", "boat", True),
        ("A boat is not visible in this picture.", "boat", False),
        ("The picture does not show the boat.", "boat", False),
        ("Without a doubt this is a tiger.", "tiger", True),
        ("It is no longer red.", "red", False),
        ("Neither a tiger nor a cat is in the room.", "cat", False),
        ("It looks like a tiger.", "tiger", True),
        ("It moves like a tiger.", "tiger", False),
        ("It may be a tiger.", "tiger", None),
        ("Is it a tiger?", "tiger", None),
        ("It may be a cat. The tiger sleeps.", "tiger", True),
        ("A happier child.", "happy", True),
        ("The children are smiling.", "happy", True),
        ("The reddest of all apples.", "red", True),
        ("A glass bottle.", "glass", True),
        ("A glass of milk.", "glass", False),
        ("An orange.", "orange", False),
        ("An orange cat.", "orange", True),
        ("", "tiger", False),
        ("...", "tiger", False),
        ("🐯", "tiger", False),
        ("Three zebras stand there.", "zebra", True),
        ("A horse stands there.", "zebra", False),
        ("Un cheval dans le pré. Le ciel est gris.", "tiger", False),
        ("Il n'y a ni chat ni tigre dans la maison.", "tiger", False),
        ("C'est une rose.", "pink", False),
        ("A rose in a garden.", "pink", False),
    ],
)
def test_it_reads(text: str, concept: str, said: bool | None):
    assert says(text, concept) is said


def test_unsure_counts_as_a_mention():
    assert lexicon(["It may be a tiger.", "A dog."], "tiger") == [True, False]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("一只老虎躺在草地上。", "Cjk script"),
        ("На картинке изображён тигр в траве.", "Cyrillic script"),
        ("Die Katze schläft neben einem gelben Stuhl.", "no language that it has words of"),
        ("The sign shows the word 老虎 in large letters.", "words in Cjk script"),
    ],
)
def test_what_it_cannot_read_is_told_and_counts_as_a_mention(text: str, why: str):
    with pytest.warns(UnjudgedAnswersWarning, match=f"1 of 2 descriptions, judged for 'tiger'.*{why}.*Layered"):
        assert lexicon(["A dog sits there.", text], "tiger") == [False, True]


def test_a_name_without_words_is_not_denied_in_another_language():
    with pytest.warns(UnjudgedAnswersWarning, match="'fr'.*no more than the name"):
        assert lexicon.verdicts(["On voit un cheval dans le pré."], "zebra") == [None]


def test_words_of_ones_own(tmp_path: Path):
    more = {
        "tiger": {
            "zh": {"words": ["老虎"], "never": ["老虎钳"]},
            "de": {"words": ["Tiger"]},
            "en": {"words": ["stripy one"]},
        },
        "zebra": {"en": {"words": ["zebra"], "never": ["zebra crossing"]}},
    }
    path = tmp_path / "words.json"
    path.write_text(json.dumps({"concepts": more}, ensure_ascii=False), encoding="utf-8")
    for mine in (Lexicon(more), Lexicon(path)):
        assert mine.known("zebra")
        assert mine.verdicts(["一只老虎。", "一把老虎钳。", "一只猫。"], "tiger") == [True, False, False]
        assert mine.verdicts(["Zwei Tiger liegen auf der Wiese.", "Eine Katze liegt auf der Wiese."], "tiger") == [
            True,
            False,
        ]
        assert mine.verdicts(["The stripy one sleeps.", "A tigress."], "tiger") == [True, True]
        assert mine.verdicts(["People on a zebra crossing."], "zebra") == [False]
        assert mine.name != lexicon.name
    assert Lexicon(more).name == Lexicon(path).name
    assert not lexicon.known("zebra")


@pytest.mark.parametrize(
    "bad",
    [
        {"": {"en": {"words": ["a"]}}},
        {"x": {}},
        {"x": []},
        {"x": {"domain": "object"}},
        {"x": {"en": ["a"]}},
        {"x": {"en": {"never": ["a"]}}},
        {"x": {"en": {"words": []}}},
        {"x": {"en": {"words": "abc"}}},
        {"x": {"en": {"words": ["a"], "regex": ["(a+)+"]}}},
        {"x": {"en": {"words": [1]}}},
        {"x": {"en": {"words": ["..."]}}},
        {"x": {"en": {"words": ["a" * 101]}}},
        {"x": {"english": {"words": ["a"]}}},
        {"x": {"qq": {"words": ["a"]}}},
        {"x": {"domain": 3, "en": {"words": ["a"]}}},
    ],
)
def test_words_that_are_none_are_refused(bad: Any, tmp_path: Path):
    with pytest.raises(JudgeFileError):
        Lexicon(bad)
    (tmp_path / "bad.json").write_text(json.dumps({"concepts": bad}))
    with pytest.raises(JudgeFileError, match=r"bad\.json"):
        Lexicon(tmp_path / "bad.json")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"concepts": 1}', "\x00\xff", "[" * 100_000])
def test_files_that_are_none_are_refused(content: str, tmp_path: Path):
    (tmp_path / "bad.json").write_text(content, encoding="latin-1")
    with pytest.raises(JudgeFileError, match=r"bad\.json"):
        Lexicon(tmp_path / "bad.json")
    with pytest.raises(JudgeFileError):
        Lexicon(tmp_path / "none.json")
    with pytest.raises(JudgeFileError):
        Lexicon(tmp_path)


PIECES = [
    *",.?-'虎",
    "a",
    "no",
    "not",
    "without",
    "and",
    "or",
    "the",
    "tiger",
    "like",
    "might",
    "glass",
    "of",
    "is",
    "pas",
    "un",
]


@given(st.lists(st.sampled_from(PIECES), max_size=12))
def test_any_text_has_a_verdict_and_whatever_lacks_the_word_is_no_mention(words: list[str]):
    text = " ".join(words)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnjudgedAnswersWarning)
        said = lexicon.verdicts([text], "tiger")[0]
    assert said in (True, False, None)
    if "tiger" not in text and "虎" not in text:
        assert said is not True
    if said is True:
        assert "tiger" in text


@given(st.sampled_from([case for case in labelled("development") if case.truth and case.case != "french"]))
def test_a_mention_stays_one_whatever_is_said_before_and_behind(case: Case):
    text = f"The picture was taken outdoors. {case.text} There is no elephant."
    assert lexicon([text], case.concept) == [True]


class Scripted:
    """Says what it is told to."""

    def __init__(self, name: str, said: dict[str, bool]) -> None:
        self.name = name
        self.said = said
        self.asked: list[str] = []

    def __call__(self, texts: Sequence[str], concept: str) -> list[bool]:
        self.asked += texts
        return [self.said[text] for text in texts]


def test_a_dearer_judge_is_asked_only_what_is_left_open():
    dear = Scripted("dear-1", {"It may be a tiger.": False})
    layered = Layered([lexicon, dear])
    assert layered.verdicts(["A tiger.", "It may be a tiger.", "A dog."], "tiger") == [True, False, False]
    assert dear.asked == ["It may be a tiger."]
    assert layered.name == f"{lexicon.name} > dear-1"


def test_a_lexicon_without_words_for_a_concept_denies_nothing_while_another_is_there():
    dear = Scripted("dear-1", {"A striped horse.": True})
    assert Layered([lexicon, dear])(["A zebra.", "A striped horse."], "zebra") == [True, True]
    assert dear.asked == ["A striped horse."]
    assert Layered([lexicon])(["A striped horse."], "zebra") == [False]


def test_layers_need_a_judge_and_judges_a_verdict_for_each_text():
    with pytest.raises(ValueError, match="no judges"):
        Layered([])

    class Short(Scripted):
        def __call__(self, texts: Sequence[str], concept: str) -> list[bool]:
            return [True]

    with pytest.raises(ValueError, match="1 verdicts for 2 descriptions"):
        Layered([Short("short", {})])(["a", "b"], "tiger")


@pytest.mark.parametrize("judge", [lexicon, Layered([lexicon]), BareName()])
def test_all_are_judges(judge: Any):
    assert isinstance(judge, Judge)
    assert judge([], "tiger") == []


def test_the_labels_are_sound():
    cases = labelled()
    assert 150 <= len(cases) == len({(case.concept, case.text) for case in cases})
    parts = Counter(case.part for case in cases)
    assert set(parts) == {"development", "held_out"}
    for part in parts:
        assert 0.4 < sum(case.truth for case in labelled(part)) / parts[part] < 0.7
    assert not {case.text for case in labelled("development")} & {case.text for case in labelled("held_out")}
    assert all(lexicon.known(case.concept) for case in cases)


def test_agreement_counts_as_by_hand():
    cases = [
        Case("held_out", "tiger", truth, "plain", text)
        for text, truth in zip("abcd", (True, True, False, False), strict=True)
    ]
    found = agreement(Scripted("s", {"a": True, "b": False, "c": False, "d": False}), cases)
    assert (found.accuracy.value, found.accuracy.n) == (0.75, 4)
    assert found.kappa == pytest.approx((0.75 - 0.5) / (1 - 0.5))
    assert [wrong.case.text for wrong in found.disagreements] == ["b"]
    assert found.unsure == 0


@pytest.mark.parametrize(("right", "trusted"), [(9, True), (8, False)])
def test_below_90_percent_the_results_must_say_so(right: int, trusted: bool):
    cases = [Case("held_out", "tiger", True, "plain", str(i)) for i in range(10)]
    found = agreement(Scripted("weak-1", {str(i): i < right for i in range(10)}), cases)
    assert found.trusted is trusted
    assert (found.warning is None) is trusted
    if not trusted:
        assert "weak-1 agrees with only 80.0% [49.0, 94.3] of 10" in str(found.warning)


def test_unsure_is_counted_and_compared_as_a_mention():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = agreement(lexicon, [Case("held_out", "tiger", False, "script", "一只老虎")])
    assert found.unsure == 1
    assert found.disagreements[0].said is None
    with pytest.raises(ValueError, match="no cases"):
        agreement(lexicon, [])


@pytest.fixture(scope="module")
def held_out() -> Agreement:
    return agreement(lexicon)


def test_the_lexicon_is_trusted_on_what_it_was_not_made_with(held_out: Agreement):
    assert held_out.accuracy.n == len(labelled("held_out"))
    assert held_out.trusted
    assert held_out.accuracy.value > agreement(BareName()).accuracy.value + 0.1


def test_the_docs_tell_the_figures_that_are_measured(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    printed = capsys.readouterr().out.strip()
    docs = (Path(__file__).parent.parent / "docs" / "judges.md").read_text(encoding="utf-8")
    assert printed in docs


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for arguments in (
        ["--endpoint", "http://localhost:1/v1"],
        ["--nli", str(tmp_path / "none")],
        ["--entries", "none.json"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code
    assert "Traceback" not in capsys.readouterr().err
