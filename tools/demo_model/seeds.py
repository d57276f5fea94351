"""What SmolLM2 is asked for: varied seeds, each with the plain user turn that our model will see instead."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from words import (
    ANIMALS,
    COMMON,
    EVERYDAY,
    HELPERS,
    NAMES,
    OBJECTS,
    PEOPLE,
    PLACES,
    THINGS,
    TOPICS,
    TRAITS,
    TROUBLES,
    WANTS,
)  # fmt: skip

SYSTEM = "You are a helpful AI assistant."


@dataclass(frozen=True)
class Seed:
    """`user` is the turn that is kept; `teacher` what SmolLM2 is asked instead; `prefix` and `beats` are our own lines
    at the head of each paragraph, `closing` one at the end; a reply has at least `floor` tokens and ends at the first
    full sentence past `soft`."""

    kind: str
    user: str = ""
    teacher: str = ""
    prefix: str = ""
    beats: tuple[str, ...] = ()
    closing: str = ""
    floor: int = 3
    soft: int = 200
    must: tuple[str, ...] = field(default=())
    system: str = SYSTEM


def a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def request(rng: random.Random, about: str) -> str:
    text = rng.choice(
        (
            "Tell me a story about {}.", "Tell me a story about {}.", "Tell me a story about {}", "Tell me a short story about {}.",
            "Write a short story about {}.", "Write a story about {}.", "Can you tell me a story about {}?", "tell me a story about {}",
            "Please tell me a bedtime story about {}.", "I would like a story about {}.", "Make up a story about {}.",
            "Could you write a little story about {}?", "A story about {}, please.",
        )
    )  # fmt: skip
    return text.format(about)


CLOSINGS = (
    " And {n} lived happily ever after.", " It was the best day of {n}'s life.", " That night, {n} slept very well.", " {n} never forgot that day.",
    " And {n} was never lonely again.", " {n} went home with a smile.", "\n\nFrom that day on, everyone knew {n} the {h}.", " And they all laughed together.",
    " {n} was happy, and so were all the others.", " And that is how {n} found a friend.", "\n\nAnd so {n} the {h} was happy at last.", " {n} was proud, and the stars came out.",
)  # fmt: skip


def story(rng: random.Random) -> Seed:
    """Three paragraphs: our line opens each, so that the story keeps its hero, has a trouble and comes to an end."""
    group = rng.choices((COMMON, ANIMALS, PEOPLE, THINGS), (3, 5, 3, 3))[0]
    hero, name, trait, place = rng.choice(group), rng.choice(NAMES), rng.choice(TRAITS), rng.choice(PLACES)
    thing, want, helper, trouble = rng.choice(OBJECTS), rng.choice(WANTS), rng.choice(HELPERS), rng.choice(TROUBLES)
    day = rng.choice(
        ("One morning,", "One day,", "One cold evening,", "One summer day,", "One night,", "One windy afternoon,")
    )
    hero_t = f"{trait} {hero}"
    opening = rng.choice(
        (
            f"Once upon a time, there was {a(hero_t)} named {name} who lived {place}. {name} {want}.",
            f"Once upon a time, {a(hero_t)} named {name} lived {place}. {name} {want}.",
            f"{name} was {a(hero_t)} who lived {place}. {name} {want}. {day}",
            f"There was once {a(hero_t)} called {name}. {name} lived {place} and {want}.",
            f"Long ago, {place}, there lived {a(hero_t)} named {name}. {day} {name} found {a(thing)}.",
            f"{day} {a(hero_t)} named {name} found {a(thing)} {place}.",
            f"{name} the {hero} lived {place}. {name} {want}. {day} {name} found {a(thing)}.",
        )
    )
    middle = rng.choice(
        (
            f"But then {trouble}.", f"On the way, {name} met {helper}.", f"Suddenly, {trouble}. {name}", f"The next day, {name} met {helper}.",
            f"Just then, {helper} came by.", f"But {name} was not alone: {helper} was there too.", f'"Can you help me?" {name} asked {helper}.', "But it was not easy.",
            f"{name} looked everywhere, but {trouble}.", f"That night, {trouble}.", f'"Do not worry," said {helper}.', f"{name} had an idea.",
        )
    )  # fmt: skip
    last = rng.choice(
        (
            "In the end,", f"From that day on, {name}", "At last,", f"{name} smiled.", f"When the sun went down, {name}", "And so,",
            f"After that, {name} never", f"{name} learned that", f"Everyone was happy, and {name}", "From then on,", f"Back at home, {name}", "Finally,",
        )
    )  # fmt: skip
    about = rng.choices(
        (a(hero), a(hero_t), f"{a(hero)} named {name}", f"{a(hero)} and {a(thing)}", f"{a(hero)} who {want}"),
        (10, 3, 2, 2, 2) if thing in opening else (10, 3, 2, 0, 2),
    )[0]
    if want not in opening and " who " in about:
        about = a(hero)
    teacher = f"Write a story for children about {a(hero_t)} named {name}. Use simple words and short sentences. The story has a happy end."
    closing = rng.choice(CLOSINGS).format(n=name, h=hero) if rng.random() < 0.65 else ""
    return Seed("story", request(rng, about), teacher, opening, (middle, last), closing, 18, 42, (name,))


def words_story(rng: random.Random) -> Seed:
    picks = rng.sample(rng.choice((ANIMALS + THINGS, PEOPLE + THINGS, THINGS)), 3)
    name = rng.choice(NAMES)
    listed = f"{picks[0]}, {picks[1]} and {picks[2]}"
    user = rng.choice(
        (
            "Write a short story that uses the words {}.",
            "Tell me a story with these words: {}.",
            "Use the words {} in a short story.",
        )
    ).format(listed)
    opening = rng.choice(("One day, ", "Once upon a time, ", "")) + rng.choice(
        (f"{name} the {picks[0]} found {a(picks[1])} next to {a(picks[2])}.", f"{name} had {a(picks[0])}, {a(picks[1])} and {a(picks[2])}.",
         f"{name} saw {a(picks[0])} and {a(picks[1])} behind {a(picks[2])}.")
    )  # fmt: skip
    return Seed(
        "words",
        user,
        user + " Use simple words.",
        opening,
        (rng.choice(("In the end,", f"{name} smiled.", "At last,")),),
        "",
        14,
        60,
        tuple(picks),
    )


def explain(rng: random.Random, lexicon: list[tuple[str, str]]) -> Seed:
    if rng.random() < 0.15:
        topic = rng.choice(TOPICS)
        ask = rng.choice(
            (
                "Explain {} simply.",
                "Explain {} to a child.",
                "What can you tell me about {}?",
                "Tell me about {}.",
                "Why is {} important?",
                "How would you explain {}?",
            )
        )
        return Seed(
            "explain", ask.format(topic), ask.format(topic) + " Answer in three or four short sentences.", soft=70
        )
    word, gloss = rng.choice(lexicon)
    form = rng.random()
    if form < 0.5:
        ask = rng.choice(
            (
                "Explain the word {} simply.",
                "Explain {} in simple words.",
                'What does "{}" mean? Explain it simply.',
                "Explain {} and give an example.",
            )
        )
        teacher = f'The word "{word}" means: {gloss}. Explain the word in simple words, in two or three sentences, and give an example.'
        return Seed("explain", ask.format(word), teacher, soft=60, must=(word,))
    ask = rng.choice(("Write one sentence with the word {}.", "Use {} in a sentence.", 'Give me a sentence with "{}".'))
    return Seed(
        "sentence",
        ask.format(word),
        f'The word "{word}" means: {gloss}. Write one sentence with the word {word}.',
        soft=8,
        must=(word,),
    )


def howto(rng: random.Random) -> Seed:
    task = rng.choice(EVERYDAY)
    ask = rng.choice(
        (
            "How do I {}?",
            "How can I {}?",
            "What is the best way to {}?",
            "Give me some tips: how to {}?",
            "Teach me to {}.",
            "Can you help me {}?",
        )
    )
    return Seed("howto", ask.format(task), ask.format(task) + " Answer in a few short sentences.", soft=90)


GREETINGS = """Hi!|Hello|Hi, how are you?|Good morning!|Hello there|How are you today?|Hey|I am sad today.|I am bored.
I am tired.|I am happy today!|Thank you!|What should I do today?|Can you help me?|I had a bad day.|Tell me something nice.
Tell me something interesting.|I like cats.|I like music.|It is raining.|What is your favorite color?|Let's talk.
I have a test tomorrow.|I cannot sleep.|I want to learn something new.|What should I eat for dinner?|Good night!
My friend is angry with me.|I am nervous.|I lost my keys.|It is my birthday today!|What makes people happy?""".replace(
    "\n", "|"
).split("|")
SECOND = """Thank you!|Can you say that more simply?|Tell me more.|Why?|Can you give me an example?|That is interesting. What else?
Thanks, that helps.|How do you know?|What do you mean?|And then?|Is that always true?|Can you make it shorter?""".replace(
    "\n", "|"
).split("|")


def second_turn(rng: random.Random) -> str:
    return rng.choice(SECOND)


def chat(rng: random.Random) -> Seed:
    greeting = rng.choice(GREETINGS)
    return Seed(
        "chat", greeting, greeting, soft=30, system=SYSTEM + " You answer in one or two short, friendly sentences."
    )


def lexicon(path: Path | None) -> list[tuple[str, str]]:
    """Common words with their first gloss, one tab-separated pair a line (sources.py writes it)."""
    if path is None:
        return [("harbor", "a sheltered port where ships can take on or discharge cargo")]
    pairs = [tuple(line.split("\t")) for line in path.read_text().splitlines()]
    return [(p[0], p[1]) for p in pairs]


def seeds(rng: random.Random, words: list[tuple[str, str]]) -> Iterator[Seed]:
    """An endless, varied stream; the weights are shares of the jobs started."""
    while True:
        kind = rng.choices(("story", "words", "explain", "howto", "chat", "own"), (60, 8, 20, 6, 2, 6))[0]
        if kind == "story":
            yield story(rng)
        elif kind == "words":
            yield words_story(rng)
        elif kind == "explain":
            yield explain(rng, words)
        elif kind == "howto":
            yield howto(rng)
        elif kind == "chat":
            yield chat(rng)
        else:  # SmolLM2 writes the user's turn itself
            yield Seed("own", soft=110)
