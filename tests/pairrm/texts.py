"""Texts of a tiny world, odd ones among them, and rows of them."""

from __future__ import annotations

import random


def wide(text: str) -> str:
    """In full-width letters, which NFKC makes plain ones again."""
    return "".join(chr(ord(letter) + 0xFEE0) for letter in text)


SAID = "the a of to in is it that for was on are with they be at one have this from or had by hot but some what there"
WORDS = f"{SAID} we can out other were all your when up use word how said an each she which do their time if".split()
ODD = [
    "…", "™", wide("Full"), wide("width!"), "ﬁne ﬂow", "e\u0301a\u0300",
    "\u05e9\u05dc\u05d5\u05dd", "\u0645\u0631\u062d\u0628",
    "\U0001f469\u200d\U0001f467", "\U0001f389", "a\x00b", "\u200b", "日本語の文", "½ ① Å", "\t\n  \n", "   ",
    "<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>", "[SEP]", "[CLS]", "[PAD]", "<|sou[SEP]rce|>",
]  # fmt: skip
WIDTHS = (1, *[2] * 16, 3, 3, 4)  # llm-blender takes its time with each pair


def text(drawn: random.Random, most: int) -> str:
    """Up to so many words, every eighth of them odd; sometimes nothing."""
    words = [drawn.choice(ODD) if drawn.random() < 0.12 else drawn.choice(WORDS) for _ in range(drawn.randint(0, most))]
    return drawn.choice([" ", " ", "  ", ""]).join(words)


def rows(count: int, seed: int, *, most: int, width: int | None = None) -> tuple[list[str], list[list[str]]]:
    """Prompts, and one to four candidates of each (or `width`), some of them equal; most: words of a text."""
    drawn = random.Random(seed)
    prompts, candidates = [], []
    for _ in range(count):
        texts = [text(drawn, most) for _ in range(width or drawn.choice(WIDTHS))]
        if drawn.random() < 0.3:
            texts[-1] = texts[0]
        prompts.append(text(drawn, most))
        candidates.append(texts)
    return prompts, candidates
