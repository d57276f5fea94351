"""Which generated replies are kept: no loops, no refusals, no talk about the writing model, plain English only."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

BAD = re.compile(
    r"as an ai|language model|smollm|hugging ?face|openai|chatgpt|i('m| am) sorry|i can(no|')t|i('m| am) unable|i don't have|"
    r"https?://|www\.|@\w|\[|\{|<|\||#|```|the story (of|is|ends|ended)|this story|short story|story about|happy ending|the moral|"
    r"once upon a time.*once upon a time|\bsex|\bkill|murder|suicid|\bdrug|\brape|\bnazi|\bporn",
    re.IGNORECASE | re.DOTALL,
)
PLAIN = re.compile(r"[\x20-\x7e\n\u2018\u2019\u201c\u201d\u2013\u2014\u00e9\u00b0]*")
SENTENCE = re.compile(r"(?<=[.!?])[\"\u201d]?\s+")
STORIES = ("story", "words")


def plain(text: str) -> str:
    """Typewriter quotes and dashes, one blank line between paragraphs."""
    for fancy, ascii_ in (
        ("\u2018", "'"),
        ("\u2019", "'"),
        ("\u201c", '"'),
        ("\u201d", '"'),
        ("\u2014", " - "),
        ("\u2013", "-"),
    ):
        text = text.replace(fancy, ascii_)
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", re.sub(r"[ \t]+", " ", text)).strip()


def loops(text: str) -> bool:
    """Repeated sentences, repeated four-word runs, or too small a vocabulary for the length."""
    words = re.findall(r"[a-z']+", text.lower())
    if len(words) < 12:
        return False
    grams = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    repeated = sum(n - 1 for n in grams.values())
    bigrams = Counter(pairwise(words))
    sentences = [s.strip().lower() for s in SENTENCE.split(text) if len(s) > 12]
    return (
        repeated > 0.04 * len(words)
        or max(grams.values()) > 2
        or len(set(words)) < 0.42 * len(words)
        or len(set(words)) < 3.6 * len(words) ** 0.6
        or max(bigrams.values()) > max(3, len(words) // 22)
        or len(set(sentences)) < len(sentences)
    )


def keep(kind: str, user: str, reply: str, must: tuple[str, ...]) -> bool:
    """True for a complete reply worth learning from."""
    if not PLAIN.fullmatch(reply) or BAD.search(reply) or not re.search(r"[.!?][\"']?$", reply):
        return False
    low = reply.lower()
    if any(word.lower() not in low for word in must):
        return False
    words = len(reply.split())
    low_limit, high_limit = {"story": (60, 260), "words": (40, 220), "sentence": (5, 40)}.get(kind, (4, 220))
    if not low_limit <= words <= high_limit or loops(reply):
        return False
    if kind in STORIES and (
        low.count("story") > 1
        or re.search(r"\b(you|your)\b", re.sub(r'"[^"]*"', "", reply.lower().rsplit("\n\n", 1)[-1]))
    ):
        return False
    return low[:40] != user.lower()[:40]


def good_question(text: str) -> bool:
    """A user turn that SmolLM2 wrote and that a small model can answer."""
    return 3 <= len(text.split()) <= 30 and bool(PLAIN.fullmatch(text)) and not BAD.search(text) and "\n" not in text
