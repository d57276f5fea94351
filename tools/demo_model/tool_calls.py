"""Programmatic tool-call conversations over a few hundred schemas, rendered in the hermes / Qwen form.

A schema is a verb, an object and some typed parameters; the request mentions every required value, so the right call can
be worked out from the text alone. About a sixth of the schemas is never trained on and serves the evaluation.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from words import ANIMALS, EVERYDAY, NAMES, THINGS, TOPICS

Record = dict[str, Any]
Rng = random.Random

CITIES = """Paris London Berlin Madrid Rome Vienna Oslo Lisbon Dublin Athens Cairo Nairobi Lagos Tokyo Osaka Seoul Beijing
Delhi Mumbai Bangkok Hanoi Sydney Toronto Boston Chicago Seattle Denver Lima Bogota Santiago Prague Warsaw Zurich
Helsinki Istanbul Jakarta Manila Dubai Tunis Accra""".split()
LANGS = (
    "French German Spanish Italian Japanese Chinese Arabic Portuguese Dutch Greek Polish Turkish Korean Hindi".split()
)
MONEY = "USD EUR GBP JPY CHF CAD AUD INR CNY SEK".split()
FOODS = "pizza|green salad|tomato soup|pasta|fried rice|apple pie|curry|bread|omelette|noodles|tacos|sushi".split("|")
ROOMS = "kitchen|bedroom|living room|bathroom|office|garage|hallway|basement".split("|")
SUBJECTS = "trip plans|weekly report|birthday party|lunch on Friday|project update|new schedule|garden work|team meeting".split(
    "|"
)
TASKS = [t for t in EVERYDAY if len(t) < 26]
WEEK = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SYSTEMS = (
    "You are a helpful assistant.",
    "You are the moestream demo model.",
    "Answer briefly.",
    "You are a friendly assistant.",
)


@dataclass(frozen=True)
class Kind:
    """A kind of value: its JSON schema, how to draw one, and how it reads in a sentence."""

    schema: dict[str, Any]
    draw: Callable[[Rng], Any]
    say: Callable[[Any], str] = str


def pick(*values: Any) -> Callable[[Rng], Any]:
    return lambda rng: rng.choice(values)


def listed(values: list[str]) -> str:
    return values[0] if len(values) == 1 else ", ".join(values[:-1]) + " and " + values[-1]


def string(values: list[str]) -> Kind:
    return Kind({"type": "string"}, pick(*values))


def enum(*values: str) -> Kind:
    return Kind({"type": "string", "enum": list(values)}, pick(*values))


def integer(low: int, high: int) -> Kind:
    return Kind({"type": "integer"}, lambda rng: rng.randint(low, high))


def number(low: int, high: int) -> Kind:
    return Kind({"type": "number"}, lambda rng: rng.choice((rng.randint(low, high), round(rng.uniform(low, high), 1))))


def array(values: list[str]) -> Kind:
    return Kind(
        {"type": "array", "items": {"type": "string"}}, lambda rng: rng.sample(values, rng.randint(2, 3)), listed
    )


PERSON, CITY, LANG = string(NAMES), string(CITIES), string(LANGS)
DATE = Kind(
    {"type": "string", "description": "YYYY-MM-DD"},
    lambda rng: f"{rng.randint(2024, 2029)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
)
TIME = Kind(
    {"type": "string", "description": "HH:MM"},
    lambda rng: f"{rng.randint(0, 23):02d}:{rng.choice((0, 15, 30, 45)):02d}",
)
EMAIL = Kind(
    {"type": "string"}, lambda rng: f"{rng.choice(NAMES).lower()}@{rng.choice(('example.com', 'mail.org', 'work.net'))}"
)
FILE = Kind(
    {"type": "string"},
    lambda rng: (
        f"{rng.choice(('notes', 'report', 'data', 'photo', 'todo', 'draft', 'budget'))}{rng.choice(('', rng.randint(1, 99)))}.{rng.choice(('txt', 'csv', 'md', 'pdf', 'png'))}"
    ),
)
FLAG = Kind({"type": "boolean"}, pick(True, False), lambda v: "yes" if v else "no")
POINT = Kind({"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}, "required": ["x", "y"]},
             lambda rng: {"x": rng.randint(0, 99), "y": rng.randint(0, 99)}, lambda v: f"x {v['x']}, y {v['y']}")  # fmt: skip
SIZE = Kind({"type": "object", "properties": {"width": {"type": "integer"}, "height": {"type": "integer"}}, "required": ["width", "height"]},
            lambda rng: {"width": rng.randint(1, 40) * 10, "height": rng.randint(1, 40) * 10}, lambda v: f"{v['width']} by {v['height']}")  # fmt: skip
UNITS = enum("celsius", "fahrenheit")

# name | description | parameters "name:KIND" (a trailing ? marks an optional one) | requests; {p} stands for a value
K: dict[str, Kind] = {
    "city": CITY, "person": PERSON, "lang": LANG, "date": DATE, "time": TIME, "email": EMAIL, "file": FILE, "flag": FLAG, "point": POINT, "size": SIZE,
    "unit": UNITS, "money": string(MONEY), "food": string(FOODS), "room": string(ROOMS), "subject": string(SUBJECTS), "task": string(TASKS), "topic": string(TOPICS),
    "animal": string(ANIMALS), "thing": string(THINGS), "day": enum(*WEEK), "small": integer(1, 12), "medium": integer(1, 120), "large": integer(100, 9999),
    "amount": number(1, 900), "level": enum("low", "medium", "high"), "color": enum("red", "green", "blue", "white", "yellow"), "people": array(NAMES),
    "items": array(THINGS), "foods": array(FOODS), "cities": array(CITIES), "sort": enum("asc", "desc"), "format": enum("json", "csv", "text"),
    "mode": enum("car", "train", "bike", "walk"), "genre": enum("jazz", "rock", "classical", "pop", "folk"), "numbers": Kind(
        {"type": "array", "items": {"type": "integer"}}, lambda rng: [rng.randint(1, 99) for _ in range(rng.randint(2, 4))], lambda v: listed([str(x) for x in v])),
}  # fmt: skip

TOOLS = """get_weather|Get the current weather of a city|city:city,unit:unit?|What is the weather in {city}?;How is the weather in {city} today?;Is it raining in {city}?
get_forecast|Get the weather forecast for some days|city:city,days:small|What will the weather be in {city} for the next {days} days?;Give me a {days} day forecast for {city}.
get_time|Get the local time of a city|city:city|What time is it in {city}?;Tell me the time in {city}.
convert_currency|Convert an amount of money|amount:amount,from_currency:money,to_currency:money|Convert {amount} {from_currency} to {to_currency}.;How much is {amount} {from_currency} in {to_currency}?
translate_text|Translate a text|text:topic,target_language:lang|Translate "{text}" into {target_language}.;How do you say "{text}" in {target_language}?
send_email|Send an email|to:email,subject:subject,body:task?|Send an email to {to} with the subject "{subject}".;Write to {to} about "{subject}".
set_alarm|Set an alarm|time:time,label:task?|Set an alarm for {time}.;Wake me up at {time}.
set_timer|Start a timer|minutes:medium|Set a timer for {minutes} minutes.;Start a {minutes} minute timer.
create_reminder|Create a reminder|text:task,date:date|Remind me to {text} on {date}.;On {date}, remind me to {text}.
create_event|Add an event to the calendar|title:subject,date:date,time:time|Add "{title}" to my calendar on {date} at {time}.;Schedule {title} for {date} at {time}.
invite_people|Invite people to an event|event:subject,guests:people|Invite {guests} to the {event}.;Please invite {guests} to "{event}".
search_web|Search the web|query:topic,max_results:small?|Search the web for {query}.;Look up {query} online.;Find information about {query}.
search_files|Search files by name|pattern:file,recursive:flag?|Find the file {pattern}.;Search my files for {pattern}.
read_file|Read a text file|path:file|Read {path}.;Show me what is in {path}.;Open the file {path}.
write_file|Write text to a file|path:file,text:topic|Write "{text}" to {path}.;Save the text "{text}" in {path}.
delete_file|Delete a file|path:file|Delete {path}.;Remove the file {path}.
copy_file|Copy a file|source:file,target:file|Copy {source} to {target}.
rename_file|Rename a file|old_name:file,new_name:file|Rename {old_name} to {new_name}.
play_music|Play music of a genre|genre:genre,volume:medium?|Play some {genre}.;I want to hear {genre} music.
turn_on_light|Turn on the light in a room|room:room,color:color?|Turn on the light in the {room}.;Light in the {room}, please.
set_light_color|Set the color of a light|room:room,color:color|Make the light in the {room} {color}.;Set the {room} light to {color}.
set_temperature|Set the temperature of a room|room:room,degrees:small|Set the {room} to {degrees} degrees.
lock_door|Lock or unlock a door|room:room,locked:flag|Should the {room} door be locked? Set it to {locked}.
order_food|Order food|dish:food,quantity:small|Order {quantity} portions of {dish}.;I would like {quantity} times {dish}.
find_recipe|Find a recipe|dish:food,servings:small?|Find a recipe for {dish}.;How do I cook {dish}? Look for a recipe.
add_to_cart|Put an item in the shopping cart|item:thing,quantity:small|Add {quantity} of the item {item} to my cart.;Put {quantity} x {item} in the cart.
shopping_list|Make a shopping list|items:foods|Make a shopping list with {items}.;I need to buy {items}.
book_table|Book a table in a restaurant|city:city,guests:small,time:time|Book a table in {city} for {guests} people at {time}.
book_hotel|Book a hotel|city:city,nights:small,check_in:date|Book a hotel in {city} for {nights} nights from {check_in}.
find_flight|Find flights|origin:city,destination:city,date:date|Find a flight from {origin} to {destination} on {date}.;I want to fly from {origin} to {destination} on {date}.
get_route|Find the way between two places|start:city,end:city,mode:mode|How do I get from {start} to {end} by {mode}?;Show the {mode} route from {start} to {end}.
plan_tour|Plan a tour through cities|stops:cities|Plan a tour through {stops}.
distance|Distance between two cities|a:city,b:city|How far is it from {a} to {b}?;What is the distance between {a} and {b}?
add_numbers|Add a list of numbers|numbers:numbers|Add {numbers}.;What is the sum of {numbers}?
average|Average of numbers|numbers:numbers|What is the average of {numbers}?
multiply|Multiply two numbers|a:medium,b:medium|Multiply {a} by {b}.;What is {a} times {b}?
power|Raise a number to a power|base:small,exponent:small|What is {base} to the power of {exponent}?
random_number|Draw a random number|minimum:small,maximum:large|Give me a random number between {minimum} and {maximum}.
roll_dice|Roll dice|count:small,sides:small|Roll {count} dice with {sides} sides.
unit_convert|Convert kilometers to another unit|kilometers:amount|How many miles are {kilometers} kilometers?
draw_rectangle|Draw a rectangle|size:size,color:color|Draw a {color} rectangle, {size}.
move_cursor|Move the cursor|position:point|Move the cursor to {position}.
place_marker|Put a marker on the map|label:thing,position:point|Put a marker named {label} at {position}.
resize_image|Resize an image|path:file,size:size|Resize {path} to {size}.
get_stock|Get the price of a share|symbol:money|What is the price of {symbol}?
get_user|Look up a user|user_id:large|Who is user {user_id}?;Look up the user {user_id}.
create_user|Create a user|name:person,email:email|Create a user {name} with the address {email}.
delete_user|Delete a user|user_id:large|Delete user {user_id}.
list_orders|List orders of a customer|customer:person,order:sort?|List the orders of {customer}.
get_order|Look up an order|order_id:large|What is the status of order {order_id}?;Where is my order {order_id}?
cancel_order|Cancel an order|order_id:large|Cancel order {order_id}.
add_contact|Add a contact|name:person,email:email|Add {name} ({email}) to my contacts.
call_contact|Call a person|name:person|Call {name}.;Please phone {name}.
send_message|Send a short message|to:person,text:task|Tell {to} to {text}.;Send {to} the message "{text}".
take_note|Write down a note|text:task|Take a note: {text}.;Note down: {text}.
define_word|Look up a word|word:thing|Look up the word {word}.;Find the definition of {word} in the dictionary.
animal_fact|Get a fact about an animal|animal:animal|Give me a fact about the {animal}.
adopt_pet|Register a pet|species:animal,name:person|Register my {species} named {name}.
feed_animal|Feed an animal|animal:animal,grams:medium|Feed the {animal} {grams} grams.
water_plant|Water a plant|plant:thing,milliliters:large|Give the {plant} {milliliters} milliliters of water.
summarize|Summarize a text file|path:file,length:level|Summarize {path}, length {length}.
export_data|Export a table|path:file,format:format|Export {path} as {format}.
sort_list|Sort items|items:items,order:sort|Sort {items} in {order} order.
set_priority|Set the priority of a task|task:task,priority:level|Set the priority of "{task}" to {priority}.
add_task|Add a task to the to-do list|task:task,day:day|Add "{task}" to my list for {day}.
open_hours|Opening hours of a shop|shop:room,day:day|When is the {shop} store open on {day}?
start_lesson|Start a language lesson|language:lang,minutes:medium|Start a {minutes} minute {language} lesson.
log_run|Log a run|kilometers:amount,date:date|I ran {kilometers} kilometers on {date}.
log_meal|Log a meal|foods:foods,day:day|On {day} I ate {foods}.
rent_bike|Rent bicycles|city:city,count:small|Rent {count} bicycles in {city}.
news|Get news about a topic|topic:topic,count:small?|What is new about {topic}?;Get me news on {topic}.
paint|Paint a picture|subject:animal,color:color|Paint a {color} {subject}.
build_model|Build a toy|thing:thing,pieces:large|Build a {thing} from {pieces} pieces.
split_bill|Split a bill|total:amount,people:small|Split a bill of {total} among {people} people.
tip|Work out a tip|total:amount,percent:small|What is a {percent} percent tip on {total}?
pay|Pay a person|to:person,amount:amount,currency:money|Pay {to} {amount} {currency}.
check_room|Check if a room is free|room:room,date:date,time:time|Is the {room} free on {date} at {time}?
count_words|Count the words of a file|path:file|How many words are in {path}?
print_file|Print a file|path:file,copies:small,color:flag?|Print {copies} copies of {path}.
make_team|Make a team|name:thing,members:people|Make a team called {name} with {members}.
sunrise|Time of sunrise|city:city,date:date|When does the sun rise in {city} on {date}?
holiday|Public holidays|city:city,date:date|Is {date} a holiday in {city}?""".splitlines()

VERBS = "get fetch find create add update remove check start stop open close show list send schedule".split()
OBJECTS = """invoice ticket parcel meeting playlist sensor camera report backup server ticket lesson recipe garden heater
fan window door printer job account badge ledger branch commit album photo video poll survey coupon voucher booking seat
locker vehicle drone valve pump tank shelf label batch shipment""".split()
FIELDS: dict[str, tuple[str, str]] = {  # parameter: kind, phrase
    "name": ("person", "named {}"), "id": ("large", "number {}"), "city": ("city", "in {}"), "date": ("date", "on {}"), "time": ("time", "at {}"),
    "count": ("small", "with count {}"), "level": ("level", "with level {}"), "color": ("color", "in the color {}"), "owner": ("person", "for {}"),
    "email": ("email", "and notify {}"), "amount": ("amount", "with the amount {}"), "tags": ("items", "with the tags {}"), "position": ("point", "at position {}"),
    "size": ("size", "of size {}"), "day": ("day", "for {}"), "room": ("room", "in the {}"), "path": ("file", "from the file {}"), "members": ("people", "with {}"),
    "format": ("format", "as {}"), "minutes": ("medium", "for {} minutes"), "topic": ("topic", "about {}"), "active": ("flag", "with active set to {}"),
}  # fmt: skip


@dataclass(frozen=True)
class Tool:
    name: str
    description: str
    parameters: tuple[tuple[str, Kind, bool], ...]  # name, kind, required
    requests: tuple[str, ...]

    def schema(self) -> dict[str, Any]:
        properties = {name: kind.schema for name, kind, _ in self.parameters}
        required = [name for name, _, need in self.parameters if need]
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": {"type": "object", "properties": properties, "required": required},
        }
        return {"type": "function", "function": function}

    def ask(self, rng: Rng) -> tuple[str, dict[str, Any]]:
        """A request and the arguments of the call that answers it."""
        values = {name: kind.draw(rng) for name, kind, need in self.parameters if need}
        words = {name: kind.say(values[name]) for name, kind, need in self.parameters if need}
        text = rng.choice(self.requests).format(**words)
        for name, kind, need in self.parameters:
            if not need and rng.random() < 0.3:
                values[name] = kind.draw(rng)
                text += f" Use {name.replace('_', ' ')} {kind.say(values[name])}."
        return text, values


def catalogue() -> tuple[list[Tool], list[Tool]]:
    """All tools, split into those for training and those kept for the evaluation."""
    tools = []
    for line in TOOLS:
        name, description, spec, requests = line.split("|")
        parameters = []
        for item in spec.split(","):
            parameter, kind = item.split(":")
            parameters.append((parameter, K[kind.rstrip("?")], not kind.endswith("?")))
        tools.append(Tool(name, description, tuple(parameters), tuple(requests.split(";"))))
    rng = random.Random(3)
    for noun in dict.fromkeys(OBJECTS):
        for verb in rng.sample(VERBS, 7):
            chosen = rng.sample(sorted(FIELDS), rng.randint(1, 3))
            parameters = [(f if f != "id" else f"{noun}_id", K[FIELDS[f][0]], True) for f in chosen]
            phrase = " ".join(FIELDS[f][1].format("{" + p[0] + "}") for f, p in zip(chosen, parameters, strict=True))
            verbal = f"{verb.capitalize()} {rng.choice(('an' if noun[0] in 'aeiou' else 'a', 'the'))} {noun} {phrase}."
            asks = (verbal, f"Please {verbal[0].lower()}{verbal[1:]}", f"Can you {verbal[0].lower()}{verbal[1:-1]}?")
            tools.append(
                Tool(
                    f"{verb}_{noun}",
                    f"{verb.capitalize()} {'an' if noun[0] in 'aeiou' else 'a'} {noun}",
                    tuple(parameters),
                    asks,
                )
            )
    order = random.Random(4).sample(range(len(tools)), len(tools))
    cut = len(tools) // 6
    unseen = set(order[:cut])
    return [t for i, t in enumerate(tools) if i not in unseen], [tools[i] for i in sorted(unseen)]


DONE = ("Done.", "It is done.", "All right, that is done.", "I have taken care of it.")


def answer(tool: Tool, values: dict[str, Any], rng: Rng) -> tuple[dict[str, Any], str]:
    """A made-up tool result and the reply in words."""
    kind = rng.randrange(4)
    if tool.name == "get_weather":
        result = {
            "temperature": rng.randint(-9, 38),
            "condition": rng.choice(("sunny", "cloudy", "rainy", "windy", "snowy")),
        }
        return result, f"In {values['city']} it is {result['condition']} with {result['temperature']} degrees."
    if tool.name == "get_time":
        result = {"time": TIME.draw(rng)}
        return result, f"It is {result['time']} in {values['city']}."
    if kind == 0:
        return {"status": "ok"}, rng.choice(DONE)
    if kind == 1:
        number_ = rng.randint(100, 9999)
        return {"status": "ok", "id": number_}, f"Done. The number is {number_}."
    if kind == 2:
        value = rng.choice((rng.randint(1, 5000), round(rng.uniform(1, 900), 1)))
        return {"result": value}, f"The result is {value}."
    error = rng.choice(("not found", "permission denied", "timeout", "service not available"))
    return {"error": error}, f"Sorry, that did not work: {error}."


REFUSE = (
    "None of my tools can do that.",
    "I have no tool for that.",
    "I am sorry, I do not have a tool for that request.",
)


def call_turn(calls: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls],
    }


def conversation(pool: list[Tool], rng: Rng) -> Record:
    """One record: a call (one or two), sometimes with result and reply, or a request that no tool fits, or small talk."""
    offered = rng.sample(pool, rng.choice((1, 1, 2, 2, 3, 4)))
    shuffled = rng.sample(offered, len(offered))
    turns: list[dict[str, Any]] = []
    if rng.random() < 0.4:
        turns.append({"role": "system", "content": rng.choice(SYSTEMS)})
    roll = rng.random()
    if roll < 0.1:
        other = rng.choice([t for t in pool if t.name not in {o.name for o in offered}])
        turns += [{"role": "user", "content": other.ask(rng)[0]}, {"role": "assistant", "content": rng.choice(REFUSE)}]
    elif roll < 0.14:
        turns += [
            {"role": "user", "content": rng.choice(("Hello", "Hi!", "Good morning"))},
            {"role": "assistant", "content": rng.choice(("Hello! How can I help you?", "Hi! What can I do for you?"))},
        ]
    else:
        count = 2 if roll > 0.88 else 1
        chosen = [rng.choice(offered) for _ in range(count)]
        asked = [t.ask(rng) for t in chosen]
        text = asked[0][0] if count == 1 else f"{asked[0][0]} {rng.choice(('Also: ', 'And then: ', ''))}{asked[1][0]}"
        if rng.random() < 0.1:
            text = text[0].lower() + text[1:].rstrip(".")
        turns.append({"role": "user", "content": text})
        turns.append(call_turn([(t.name, v) for t, (_, v) in zip(chosen, asked, strict=True)]))
        if rng.random() < 0.45:
            replies = [answer(t, v, rng) for t, (_, v) in zip(chosen, asked, strict=True)]
            turns += [{"role": "tool", "content": json.dumps(result)} for result, _ in replies]
            turns.append({"role": "assistant", "content": " ".join(text for _, text in replies)})
            if rng.random() < 0.25:
                again = rng.choice(offered)
                ask, values = again.ask(rng)
                turns += [{"role": "user", "content": ask}, call_turn([(again.name, values)])]
    return {"source": "tool_calls", "tools": [t.schema() for t in shuffled], "messages": turns}


def records(count: int, seed: int, unseen: bool) -> Iterator[Record]:
    seen, kept = catalogue()
    rng = random.Random(seed)
    for _ in range(count):
        yield conversation(kept if unseen else seen, rng)
