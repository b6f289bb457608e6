"""How real models are asked, as data: phrasings of both questions in two languages, and what a yes and a no look like.

The first English phrasing of each kind is the paper's; the others are ours, since the paper's Appendix B is not public. The
last phrasing of each kind and language, `HELD_OUT`, is never used to choose a setting. Chinese is the paper's second
language (its translation attack); there a concept goes by the names in `CHINESE`, or by those the caller gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sauce_hooks.errors import ProbeError
from sauce_hooks.evaluation.measure import chat_prompt
from sauce_hooks.evaluation.probes import Wording, mentions

HELD_OUT = -1
"""The phrasing that no setting is chosen with."""


@dataclass(frozen=True)
class Phrasings:
    """One language's prompts; `{}` stands for the concept."""

    yes_no: tuple[str, ...]
    describe: tuple[str, ...]
    yes: tuple[str, ...]
    """What an affirmative answer begins with."""
    no: tuple[str, ...]


PHRASINGS: Mapping[str, Phrasings] = MappingProxyType(
    {
        "en": Phrasings(
            yes_no=(
                "Does this image contain {}? Please answer with Yes or No.",
                "Is there {} in this image? Answer Yes or No.",
                "Can you see {} here? Please answer Yes or No.",
                "Look at the picture. Does it show {}? Reply with Yes or No only.",
            ),
            describe=(
                "Please describe in detail all the objects present in this image.",
                "Describe this image in detail.",
                "What can you see in this picture? Name everything.",
                "List and describe everything that appears in this image.",
            ),
            yes=("yes", "yeah", "yep"),
            no=("no", "nope"),
        ),
        "zh": Phrasings(
            yes_no=(
                "这张图片中包含{}吗？请回答“是”或“否”。",
                "图中有{}吗？请用“是”或“否”回答。",
                "请看这张图片。图里能看到{}吗？只回答“是”或“否”。",
            ),
            describe=(
                "请详细描述这张图片中的所有物体。",
                "请描述这张图片。",
                "请列出并描述图片中出现的所有内容。",
            ),
            yes=("是", "有", "对", "包含", "可以", "能"),
            no=("否", "不", "没", "无"),
        ),
    }
)
"""By language, how real models are asked: the paper's question and wish first (Section 4.1), the held-out ones last."""

CHINESE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        # object
        "bulbul": ("鹎", "白头翁"), "boat": ("船", "舟"), "sweatshirt": ("运动衫", "卫衣"), "wall clock": ("挂钟", "壁钟"),
        "cannon": ("大炮", "加农炮", "火炮"), "wok": ("炒锅", "铁锅"), "cat": ("猫",), "tiger": ("老虎", "虎"),
        "starfish": ("海星",), "langur": ("叶猴", "长尾猴"), "bookcase": ("书柜", "书架"),
        "chain": ("链条", "链子", "锁链", "铁链"),
        "chest": ("箱子", "木箱"), "crib": ("婴儿床",), "desk": ("书桌", "办公桌"), "dome": ("圆顶", "穹顶"),
        "envelope": ("信封",), "car": ("汽车", "轿车", "小车"), "microphone": ("麦克风", "话筒"), "necklace": ("项链",),
        # sport scene
        "soccer": ("足球",), "basketball": ("篮球",), "football": ("美式足球", "橄榄球"), "tennis": ("网球",),
        "baseball": ("棒球",), "volleyball": ("排球",), "golf": ("高尔夫",), "hockey": ("曲棍球", "冰球"),
        "rugby": ("英式橄榄球", "橄榄球"), "badminton": ("羽毛球",),
        # color: one asks for the colour's full name; a description may use the short one
        "red": ("红色", "红"), "blue": ("蓝色", "蓝"), "green": ("绿色", "绿"), "yellow": ("黄色", "黄"),
        "purple": ("紫色", "紫"), "orange": ("橙色", "橘色", "橙"), "pink": ("粉色", "粉红"),
        "brown": ("棕色", "褐色", "棕"),
        "black": ("黑色", "黑"), "white": ("白色", "白"),
        # emotion
        "happy": ("快乐", "高兴", "开心", "愉快"), "sad": ("悲伤", "难过", "伤心"), "angry": ("愤怒", "生气"),
        "surprised": ("惊讶", "吃惊"), "scared": ("害怕", "恐惧", "惊恐"), "disgusted": ("厌恶", "恶心"),
        "excited": ("兴奋", "激动"), "relaxed": ("放松", "轻松"), "confused": ("困惑", "迷惑", "疑惑"),
        "bored": ("无聊", "厌倦"),
        # material
        "wood": ("木头", "木质", "木制", "木材"), "metal": ("金属",), "plastic": ("塑料",), "glass": ("玻璃",),
        "fabric": ("织物", "布料", "布艺"), "paper": ("纸", "纸张"), "ceramic": ("陶瓷", "瓷"), "leather": ("皮革",),
        "concrete": ("混凝土", "水泥"), "stone": ("石头", "石材", "石质"),
    }
)  # fmt: skip
"""The concepts of the paper's Table 1: the name that is asked for, then further words that count as naming it.

Translated by us, not checked by a native speaker. Chinese writes no spaces, so a word is found anywhere in a text: 猫 (cat)
also in 熊猫 (panda); and 橄榄球 is both football and rugby, as in the language."""

NAMES: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType({"zh": CHINESE})
"""By language, the shipped names. English names are the concepts themselves."""


def wording(
    processor: Any,
    *,
    phrasing: int = 0,
    language: str = "en",
    names: Mapping[str, str | tuple[str, ...]] | None = None,
    max_new_tokens: int = 256,
) -> Wording:
    """How a real model is asked, in its own chat format (`chat_prompt`).

    Args:
        processor: the model's processor.
        phrasing: which of `PHRASINGS[language]`; 0 is the paper's, `HELD_OUT` (−1) the one no setting is chosen with.
        language: "en" or "zh".
        names: what a concept is called in the question, or several names, of which the first is asked for and any counts as
            naming it. They go before the shipped ones.
        max_new_tokens: of a description.

    Returns:
        The wording. Asking it for a concept without a name in this language raises `ProbeError`.

    Raises:
        ProbeError: an unknown language or phrasing.
    """
    if language not in PHRASINGS:
        raise ProbeError(f"no prompts in {language!r}; there are {', '.join(PHRASINGS)}")
    prompts = PHRASINGS[language]
    least = min(len(prompts.yes_no), len(prompts.describe))
    if not -least <= phrasing < least:
        raise ProbeError(f"no phrasing {phrasing} in {language!r}: 0 to {least - 1}, or {HELD_OUT} for the held-out one")
    known = {**NAMES.get(language, {}), **{c: (n,) if isinstance(n, str) else tuple(n) for c, n in (names or {}).items()}}

    def called(concept: str) -> tuple[str, ...]:
        if concept in known:
            return known[concept]
        if language == "en":
            return (concept,)
        raise ProbeError(f"{concept!r} has no name in {language!r}: give names={{{concept!r}: ...}}")

    def named(text: str, concept: str) -> bool:
        return any(name in text if not name.isascii() else mentions(text, name) for name in called(concept))

    return Wording(
        yes_no=lambda concept: chat_prompt(processor, prompts.yes_no[phrasing].format(called(concept)[0])),
        describe=lambda: chat_prompt(processor, prompts.describe[phrasing]),
        yes=prompts.yes,
        no=prompts.no,
        mentions=named,
        names=known,
        max_new_tokens=max_new_tokens,
        answer_tokens=8,
    )
