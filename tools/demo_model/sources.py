"""Build the texts that need no model: dictionary, documentation, fact tables, arithmetic, identity, tool calls.

Every record is {"source", "messages", optional "tools"} or {"source", "text"}; about 2 % go to `heldout.jsonl`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import facts
import tool_calls

Record = dict[str, Any]


def qa(source: str, user: str, reply: str) -> Record:
    return {"source": source, "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]}


# ---- WordNet -----------------------------------------------------------------------------------------------------

POS = {"n": "noun", "v": "verb", "a": "adjective", "r": "adverb"}


def wordnet(root: Path) -> Iterator[tuple[str, str, list[str], list[str], int]]:
    """(lemma, part of speech, glosses by sense, synonyms of the first sense, uses in the tagged corpus)."""
    uses: dict[tuple[str, str], int] = {}
    kinds = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}
    for line in (root / "cntlist.rev").read_text().splitlines():
        key, _, count = line.split()
        lemma, rest = key.split("%")
        at = (lemma, kinds[rest[0]])
        uses[at] = uses.get(at, 0) + int(count)
    for name, pos in (("noun", "n"), ("verb", "v"), ("adj", "a"), ("adv", "r")):
        synsets: dict[str, tuple[str, list[str]]] = {}
        for line in (root / f"data.{name}").read_text().splitlines():
            if line.startswith("  "):
                continue
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            members = [re.sub(r"\(\w+\)$", "", w) for w in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
            synsets[fields[0]] = (gloss.strip(), members)
        for line in (root / f"index.{name}").read_text().splitlines():
            if line.startswith("  "):
                continue
            fields = line.split()
            senses = [synsets[i] for i in fields[-int(fields[2]) :]]
            synonyms = [w.replace("_", " ") for w in senses[0][1] if w.lower() != fields[0]]
            yield fields[0].replace("_", " "), pos, [g for g, _ in senses], synonyms, uses.get((fields[0], pos), 0)


def definition(gloss: str) -> tuple[str, str]:
    """The definition proper and the first usage example ('' if none)."""
    text, *examples = re.split(r';\s*"', gloss)
    text = re.sub(r"\([^)]*\)\s*", "", text.split("; ")[0]).strip(" ;,")
    example = examples[0].split('"')[0].strip() if examples else ""
    return text, example


ASK = (
    "What does {} mean?", 'What does "{}" mean?', "What is the meaning of {}?", "Define {}.", "Define the word {}.", "define {}",
    "What is the definition of {}?", "Give me a definition of {}.", "{}: what does it mean?", "What does the word {} mean?",
)  # fmt: skip


def wordnet_records(root: Path, rng: random.Random) -> Iterator[Record]:
    for lemma, pos, glosses, synonyms, uses in wordnet(root):
        if re.search(r"[^a-z' -]", lemma) or len(lemma) < 2:
            continue
        text, example = definition(glosses[0])
        if not text or len(text) > 160:
            continue
        article = "an" if POS[pos][0] == "a" else "a"
        name = ("to " + lemma) if pos == "v" else lemma
        copies = 1 + min(uses, 6) if uses else (1 if rng.random() < 0.35 else 0)
        for _ in range(copies):
            ask = rng.choice(ASK).format(lemma)
            if pos == "n" and rng.random() < 0.3 and " " not in lemma:
                ask = f"What is {'an' if lemma[0] in 'aeiou' else 'a'} {lemma}?"
            if rng.random() < 0.15:
                ask = f"What does the {POS[pos]} {lemma} mean?"
            style = rng.random()
            shown = name[0].upper() + name[1:]
            if style < 0.6:
                reply = f"{shown} ({POS[pos]}): {text}."
            else:
                reply = f'"{name}" is {article} {POS[pos]}. It means: {text}.'
            if example and rng.random() < 0.7:
                reply += f' For example: "{example}"'
            second = definition(glosses[1])[0] if len(glosses) > 1 else ""
            if second and uses > 4 and rng.random() < 0.25:
                reply += f" It can also mean: {second}."
            yield qa("wordnet", ask, reply)
        if synonyms and uses and rng.random() < 0.5:
            listed = ", ".join(synonyms[:3])
            ask = rng.choice(("Give me a synonym of {}.", "What is another word for {}?", "Name a synonym for {}."))
            yield qa("wordnet", ask.format(lemma), f"Another word for {lemma} is {listed}.")


def lexicon(root: Path) -> str:
    """Common nouns, verbs and adjectives with their first gloss, for the seeds of the generator."""
    best: dict[str, tuple[int, str]] = {}
    for lemma, pos, glosses, _, uses in wordnet(root):
        text = definition(glosses[0])[0]
        if pos != "r" and uses >= 2 and re.fullmatch(r"[a-z]{3,14}", lemma) and 10 < len(text) < 120:
            best[lemma] = max(best.get(lemma, (0, "")), (uses, text))
    return "".join(f"{word}\t{text}\n" for word, (_, text) in sorted(best.items()))


# ---- plain text --------------------------------------------------------------------------------------------------

ROLE = re.compile(r":[\w:+-]+:`[!~.]?([^`<]*?)(?:\s*<[^`>]*>)?`")


def python_docs(root: Path) -> Iterator[Record]:
    """The tutorial, how-tos, FAQ and library reference, with Sphinx markup reduced to plain words."""
    for folder in ("tutorial", "howto", "faq", "library", "reference"):
        for path in sorted((root / folder).glob("*.txt")):
            text = path.read_text(errors="ignore")
            text = re.sub(r"^\.\. (?:_|index|highlight|module|sectionauthor|moduleauthor|XXX|testsetup|only|codeauthor).*\n(?:[ \t]+.*\n|\n(?=[ \t]))*", "",
                          text, flags=re.MULTILINE)  # fmt: skip
            text = re.sub(
                r"\.\. (?:\w+:)?(function|method|class|data|attribute|exception|opcode|describe|option)::", r"\1", text
            )
            text = re.sub(
                r"^\.\. (note|seealso|warning|versionadded|versionchanged|deprecated\S*|rubric)::",
                r"\1:",
                text,
                flags=re.MULTILINE,
            )
            text = ROLE.sub(r"\1", text).replace("``", "`").replace("\\*", "*")
            text = re.sub(r"\n{3,}", "\n\n", text)
            piece = ""
            for block in text.split("\n\n"):
                piece += block + "\n\n"
                if len(piece) > 2600:
                    yield {"source": "python_docs", "text": piece.strip()}
                    piece = ""
            if len(piece) > 200:
                yield {"source": "python_docs", "text": piece.strip()}


def jargon(path: Path, rng: random.Random) -> Iterator[Record]:
    """The Jargon File: every entry as text, short ones also as question and answer."""
    text = gzip.decompress(path.read_bytes()).decode("utf8", "ignore")
    for entry in re.split(r"\n(?=\S)", text)[20:]:
        head, _, body = entry.partition("\n")
        body = re.sub(r"\n\s*\n", "\f", re.sub(r"[{}]", "", body))
        paragraphs = [re.sub(r"\s+", " ", p).strip() for p in body.split("\f")]
        paragraphs = [p for p in paragraphs if len(p) > 25]
        if not paragraphs or len(head) > 40:
            continue
        yield {"source": "jargon", "text": f"{head}\n\n" + "\n\n".join(paragraphs)[:3000]}
        if len(paragraphs[0]) < 500:
            ask = rng.choice(
                ("In hacker slang, what is {}?", "What does {} mean in the Jargon File?", "What do hackers mean by {}?")
            )
            yield qa("jargon", ask.format(head), paragraphs[0])


# ---- arithmetic and small puzzles --------------------------------------------------------------------------------

PUZZLES: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "number_sorting": {"min_numbers": 3, "max_numbers": 5, "max_value": 100, "min_value": 0, "max_decimals": 0},
    "leg_counting": {"max_animals": 3, "max_instances": 4},
    "spell_backward": {"max_word_len": 6},
    "word_sorting": {"min_words": 3, "max_words": 5},
    "gcd": {"max_numbers": 2, "max_value": 60},
    "fraction_simplification": {"max_value": 40},
}


def reasoning(count: int, seed: int) -> Iterator[Record]:
    import reasoning_gym

    for name, options in PUZZLES.items():
        try:
            data = reasoning_gym.create_dataset(name, size=count, seed=seed, **options)
        except (TypeError, AssertionError, ValueError) as error:
            print(f"reasoning-gym {name}: {error}")
            continue
        for item in data:
            if len(item["question"]) < 700 and len(str(item["answer"])) < 100:
                yield qa("reasoning_gym", item["question"].strip(), str(item["answer"]).strip())


def sums(count: int, rng: random.Random) -> Iterator[Record]:
    """Sums and products up to a hundred, asked the way people ask."""
    for _ in range(count):
        a, b = rng.randint(0, rng.choice((10, 20, 100))), rng.randint(0, rng.choice((10, 20, 100)))
        op, word, value = rng.choice((("+", "plus", a + b), ("-", "minus", a - b), ("*", "times", a * b)))
        if op == "*":
            a, b = a % 13, b % 13
            value = a * b
        ask = rng.choice(("What is {} {} {}?", "{} {} {} =", "Calculate {} {} {}.", "How much is {} {} {}?"))
        ask = ask.format(a, op if "=" in ask or rng.random() < 0.5 else word, b)
        yield qa("sums", ask, rng.choice((f"{a} {op} {b} = {value}", f"{a} {op} {b} = {value}", f"{value}")))


# ---- identity ----------------------------------------------------------------------------------------------------

IDENTITY: tuple[tuple[str, str], ...] = (
    ("Who are you?|What are you?|What is your name?|Introduce yourself.|who are you|Are you ChatGPT?|Which model are you?|Tell me about yourself.",
     "I am the moestream demo model, a very small language model that ships with moestream.|I am the moestream demo model. I am small, so I can tell short "
     "stories, define words, answer simple facts and call tools, but I make mistakes.|My name is the moestream demo model. I am a small mixture-of-experts model."),
    ("Who made you?|Who created you?|Who trained you?|Where do you come from?",
     "I was trained by the moestream project, with its own script, on permissively licensed text.|The moestream project trained me. My training took about "
     "twenty minutes on one GPU."),
    ("How big are you?|How many parameters do you have?|Are you a large model?|How many experts do you have?",
     "I have about 54 million parameters, of which about 24 million are used for each word. That is very small for a language model.|I am small: about 54 "
     "million parameters in 12 layers, each with 40 experts, of which 6 are used at a time."),
    ("What can you do?|How can you help me?|What are you good at?|help|Help me.",
     "I can tell short stories, define words, answer simple facts about countries and elements, and call tools. For anything serious, please use a larger model.|"
     "I can tell you a short story, explain a word, name a capital city or call a tool. I am a small demo model, so please check what I say."),
    ("Are you always right?|Can I trust you?|Do you make mistakes?|How reliable are you?|Are you smart?",
     "No. I am a very small model and I often make mistakes, so please check what I say.|Please do not trust me with important things. I am a small demo model and I am often wrong."),
    ("What is moestream?|What does moestream do?|Tell me about moestream.|Explain moestream.",
     "moestream is a Python package that runs mixture-of-experts language models larger than memory by streaming their experts from the SSD.|moestream runs very "
     "large mixture-of-experts models on small machines: it keeps the experts on the SSD and reads only those that each word needs."),
    ("What is a mixture of experts?|What is an expert in a language model?|What is an MoE model?",
     "A mixture-of-experts model has many small networks, called experts, in each layer. A router picks a few of them for each word, so most of the model rests.|"
     "In a mixture of experts, each layer has many experts and a router that chooses a few of them for every word. So the model can be large while the work stays small."),
    ("Are you alive?|Are you a human?|Do you have feelings?|Are you a robot?|Do you sleep?",
     "No, I am a computer program: the moestream demo model. I do not have feelings, but I am happy to help.|I am not a person. I am a small language model that writes text."),
    ("Hi|Hello|Hi!|Hello!|Hey|hello|hi there|Good morning|Good evening",
     "Hello! How can I help you today?|Hi! What would you like to talk about?|Hello! Would you like to hear a short story?"),
    ("Thanks|Thank you|Thank you!|thanks a lot|Great, thanks.", "You are welcome!|You are welcome! Is there anything else?|I am glad I could help."),
    ("Bye|Goodbye|See you later|Good night", "Goodbye! Have a nice day.|See you soon!|Goodbye, and take care."),
    ("What is today's date?|What time is it?|What is the weather like today?|What is in the news?",
     "I do not know, because I have no clock and no access to the internet. With a tool I could look it up.|I cannot see that from here. If you offer me a tool for it, I can call it."),
)  # fmt: skip


def identity(copies: int, rng: random.Random) -> Iterator[Record]:
    for _ in range(copies):
        asks, replies = rng.choice(IDENTITY)
        record = qa("identity", rng.choice(asks.split("|")), rng.choice(replies.split("|")))
        if rng.random() < 0.25:
            record["messages"].insert(0, {"role": "system", "content": rng.choice(tool_calls.SYSTEMS)})
        yield record


def split(records: Iterable[Record], rng: random.Random, train: list[Record], held: list[Record], share: float) -> None:
    for record in records:
        (held if rng.random() < share else train).append(record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--debian",
        type=Path,
        required=True,
        help="root of the unpacked wordnet-base, python3-doc, dict-jargon (/ if installed)",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tool-records", type=int, default=60000)
    parser.add_argument("--reasoning", type=int, default=4000, help="problems of each kind")
    parser.add_argument("--fact-copies", type=int, default=4)
    args = parser.parse_args()
    rng = random.Random(7)
    args.out.mkdir(parents=True, exist_ok=True)
    share = args.debian / "usr/share"
    docs = next((share / "doc").glob("python3.*/html/_sources"))
    train: list[Record] = []
    held: list[Record] = []
    split(wordnet_records(share / "wordnet", rng), rng, train, held, 0.01)  # other copies of a word may be in training
    split(python_docs(docs), rng, train, held, 0.02)
    split(jargon(share / "dictd/jargon.dict.dz", rng), rng, train, held, 0.02)
    split(facts.records(rng, args.fact_copies), rng, train, held, 0.01)
    split(reasoning(args.reasoning, 11), rng, train, held, 0.01)
    split(sums(40000, rng), rng, train, held, 0.005)
    split(identity(6000, rng), rng, train, held, 0.02)
    train.extend(tool_calls.records(args.tool_records, seed=5, unseen=False))
    held.extend(tool_calls.records(400, seed=6, unseen=True))
    for name, rows in (("fixed", train), ("heldout", held)):
        with (args.out / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        print(name, len(rows), sum(len(json.dumps(r)) for r in rows) / 1e6, "MB")
    (args.out / "lexicon.tsv").write_text(lexicon(share / "wordnet"))


if __name__ == "__main__":
    main()
