"""Free-form requests and the strict JSON call each one means: a small, deterministic data set.

    python examples/quickstart/toolcalls.py --out data        # data/train.jsonl, data/test.jsonl

A record is {"prompt": "book a table for two at ...", "completion": '{"tool": "book_table", "args": {...}}'}.
The held-out part is disjoint from the training part by construction: it has its own wordings, its own openings and
closings, and its own value of every free slot (names, items, cities, texts, numbers, dates, times, pairs of units).
What the two share is what a schema fixes: tools, argument names, units, and the ways to write a date or a time.
Requests name no year, so dates are in the schema's YEAR; times are on the 24-hour clock.
"""

import argparse
import calendar
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

YEAR = 2026

# The words of each part, disjoint. After a slash: any first word goes with any second one. Units: from, to.
TRAIN = {
    "openings": "please, can you, could you, hey can you, I want you to, ok now, hi! please, I need you to, quick:",
    "closings": "please, thanks, thank you, ok?, thanks a lot",
    "name": """
        Anna, Ben, Carlos, Dana, Erik, Fatima, Georg, Hana, Ivan, Julia, Kenji, Lena, Mateo, Nadia, Oscar, Priya,
        Quentin, Rosa, Samir, Tina, Umar, Vera, Walter, Ximena, Yusuf, Zoe, Aunt May, Dr Hall, Mr Novak, Mom, Grandpa,
        Ms Okafor, the landlord, the plumber, Jean-Luc, Sofia, Liam, Minjun, Aiko, Bruno, Chiara, Duc, Elif, Farid,
        Pavel, Gina, Stefan, Marta, Tomás, Bilal, Ewa, Nina Berg, Paul Roth, Hugo, Ida, Kwame, Leila, Otto, Petra, Raj,
        Simon, Tara, Viktor, Wendy, Xavier, Yara, Zack, my brother, the neighbours, Coach Reed, Sam Li, Mrs Bauer, the
        babysitter, Judge Cole
    """,
    "item": """
        rice, flour, oat bran, green apples, brown sugar, coffee, black tea, tomatoes, red onions, salt, yogurt,
        cheddar, penne, olives, dog food, paper towels, soap, oranges, walnuts, honey, spinach, carrots, candles,
        minced beef, frozen peas, sea bass, basmati, tofu, chickpeas, cocoa, raisins, batteries, toothpaste, pine nuts,
        potatoes, rice noodles, mango chutney, baking powder, lemons, cat litter, avocados, blueberries, cream,
        crackers, cucumbers, dates, figs, foil, grapes, hazelnuts, ketchup, leeks, light bulbs, napkins, nutmeg,
        peppers, plums, pumpkin, radishes, ricotta, sponges, sugar cubes, tuna, waffles, yeast, beetroot, clams,
        pretzels, muesli, kiwis
    """,
    "city": """
        Paris, Berlin, Madrid, Rome, Vienna, Prague, Warsaw, Lyon, Hamburg, Turin, Geneva, Zurich, Brussels, Antwerp,
        Oslo, Bergen, Malmo, Leeds, York, Glasgow, Ghent, Bruges, Graz, Linz, Bern, Rouen, Lille, Nantes, Toulouse,
        Porto, Seville, Naples, Krakow, Budapest, Bucharest, Sofia, Athens, Granada, Bilbao, The Hague, Stuttgart,
        Amsterdam, Arnhem, Augsburg, Bologna, Bonn, Brno, Cadiz, Cardiff, Cork, Dresden, Essen, Gothenburg, Innsbruck,
        Leipzig, Lucerne, Lodz, Malaga, Metz, Nuremberg, Odense, Padua, Pisa, Reims, Riga, Split, Trieste, Uppsala,
        Verona, Vigo, Tampere
    """,
    "label": """
        pasta, eggs, laundry, yoga, nap, the pizza, tea, cooking, piano practice, bread dough, meditation, the roast,
        push-ups, knitting, the washing machine, chess, face mask, plank, rice cooker, break, stretching, the cake,
        parking, the oven, game night, hair dye, a power nap, sauna, guitar, French lesson, waffles, boiling potatoes,
        tennis, the quiz, my turn, a walk, drum solo, juggling, vocabulary, rest, the sauce, the steak, burpees,
        debate, exam, the puzzle, dishes, email, the kettle, vacuuming, cold brew, bath time, poker, rowing, sketching,
        the muffins, hula hoop, choir, tidying up, frying onions
    """,
    "place": """
        Blue, Golden, Old, Little, Silver, Green, Casa, Villa, Royal, Happy, Lazy, Red, Wild, Chez, Grand, Amber,
        Black, Brave, Café, Central, Copper, Crystal, Eastern, Fat, Hungry, Iron, Jade, Jolly, Lone, Misty, Modern,
        Noble, Osteria, Purple, Quiet, Rose, Secret, Stone, Tiny, Twin, Urban, Velvet, Western, Yellow / Lantern,
        Spoon, Mill, Garden, Fox, Harbour, Luna, Verde, Palace, Dragon, Olive, Barrel, Rosa, Tavern, Table, Bakery,
        Bear, Castle, Corner, Crab, Diner, Falcon, Goose, Grill, Kitchen, Lemon, Lobster, Moon, Pasta, Pearl, Ship,
        Terrace, Tiger, Willow
    """,
    "task": """
        pick up, order, check, clean, return, pack, wash, look at, pay for, ask about, move, photograph, renew, find,
        fix, paint, print, mention, deliver, test, borrow, hide, unpack, send back / the parcel, my suit, the bike, the
        car keys, dad's present, the concert tickets, the blue jacket, the new desk, library books, the garden hose,
        the tent, two chairs, the printer, my passport, the filters, Emma's laptop, the rental car, winter tyres, the
        window blinds, the birthday cake, a spare key, the fridge, school uniforms, the wine glasses, my medicine, the
        camera bag, a new battery, the ladder, the heating, Dad's watch, the tax forms, my contact lenses, the
        bookshelf, Lea's skis, the balcony door, running socks, the dog leash, the blender, the invoices, all plates,
        the piano
    """,
    "text": """
        the meeting, dinner, my flight, the bus, the parcel, lunch, the match, our lesson, the doctor, the car, the
        report, grandma, the new printer, the house, my phone, the interview, the cake, everyone, the contract, the
        train, my cousin, the new kitchen, pizza, the surgery, the neighbour, work, training, our hotel, the answer,
        the boat, class, Sarah, the ticket, the party / is late, is ready, was cancelled, has moved to room B, is on
        the way, looks great, needs more time, will be fine, is at the office, starts soon, has arrived, is next to the
        station, is not here yet, was fun, got delayed, has to wait until tomorrow, is really loud, has begun, works
        again, is sold out, costs too much, went home, can be picked up, is broken, sounds strange, was easy, ends at
        the lake, is asleep already, needs help, leaves without us, is fully booked, tastes awful
    """,
    "units": """
        km mi, mi km, kg lb, lb kg, cm in, in cm, l gal, gal l, m ft, oz g, km m, kg g, g lb, ft mi, cm m, in ft, ml l,
        mi ft, g oz, lb oz
    """,
}
HELD_OUT = {
    "openings": "kindly, would you, hello! could you please, I'd like you to, go ahead and, do me a favour and",
    "closings": "cheers, if you can, much appreciated, would you?",
    "name": """
        Amelia, Boris, Camille, Diego, Esther, Felix, Greta, Hassan, Ingrid, Jorge, Katya, Luis, Mei, Noor, Olga,
        Pablo, Ravi, Selma, Theo, Uncle Bob, Mrs Lindqvist, Prof Adeyemi, the electrician, Marie-Claire, Haruto, Jisoo
    """,
    "item": """
        bananas, almonds, butter, cherry jam, garlic, lentils, marshmallows, mushrooms, oatmeal, pears, shrimps, smoked
        salmon, sunflower seeds, sweet corn, turkey breast, washing powder, zucchini, goat cheese, couscous, bin bags,
        ginger cookies, quinoa, rye bread
    """,
    "city": """
        London, Munich, Milan, Lisbon, Helsinki, Dublin, Cologne, Salzburg, Utrecht, Edinburgh, Frankfurt, Valencia,
        Gdansk, Zagreb, Bristol, Bordeaux, Rotterdam, Basel, Luxembourg, San Sebastian, Florence, Ljubljana
    """,
    "label": """
        lasagna, jogging, the dryer, soup, violin, squats, the brownies, a shower, study session, sourdough, the grill,
        karate, podcast, ironing, the chicken, sprint review, potato gratin, crossword
    """,
    "place": """
        Crimson, Hidden, Lucky, Maison, Northern, Rusty, Sunny, Trattoria, White / Anchor, Bistro, Cellar, Elephant,
        Kettle, Magnolia, Orchid, Pepper, Swan
    """,
    "task": """
        buy, repair, wrap, sell, measure, inspect, collect, throw out / the broken lamp, Tom's guitar, hiking boots,
        the curtains, our sofa, the fish tank, the old radio, concert posters, the wedding gift, the spare wheel, my
        sunglasses, three pillows, the coffee machine
    """,
    "text": """
        the concert, breakfast, the taxi, my sister, our landlord, the homework, the package, the workshop, the baby,
        the elevator, practice, my boss / is over, was postponed, is out of order, sounds lovely, leaves from platform
        two, went well, is waiting outside, cannot come today, is almost done, looks terrible, is still asleep
    """,
    "units": "km ft, m in, kg oz, lb g, m km, l ml, g kg, ft m, ft in, mi m, in m, oz lb, m cm, gal ml",
}


@dataclass(frozen=True)
class Call:
    """One thing to ask for: the tool, the slots its wordings fill in, and arguments the wording itself settles.

    A slot is "argument:kind", or one word that is both. A wording that begins with a small letter is an imperative,
    which may get an opening; any other stands alone.
    """

    tool: str
    slots: str
    train: str
    held_out: str
    settled: dict[str, Any] = field(default_factory=dict)


CALLS = [
    Call(
        "set_timer",
        "duration-unit:period label",
        train="""
            set a timer for {duration} {unit} for {label} | start a {duration} {unit} timer for {label} | time {label}
            for {duration} {unit} | {label}: timer, {duration} {unit} | count down {duration} {unit} for {label} | set
            a {label} timer for {duration} {unit} | let me know when {duration} {unit} are over, it's for {label} |
            Timer for {label}, {duration} {unit} | I need a {duration} {unit} timer, call it {label} | give me
            {duration} {unit} for {label} | put {duration} {unit} on the clock for {label} | beep after {duration}
            {unit} for {label} | {duration} {unit} for {label}, time it | New timer: {label}, {duration} {unit} | I'm
            doing {label} for {duration} {unit}, time me | track {duration} {unit} of {label}
        """,
        held_out="""
            run a timer called {label} for {duration} {unit} | begin a countdown of {duration} {unit} for {label} |
            ring when {duration} {unit} have passed, for {label} | Start timing {label}, stop after {duration} {unit} |
            A {duration} {unit} countdown for {label}
        """,
    ),
    Call(
        "add_item",
        "item count-unit:measure",
        train="""
            add {count} {unit} of {item} to the list | put {item} on the shopping list, {count} {unit} | We need
            {count} {unit} of {item} | {item}, {count} {unit}, on the list | add {item} ({count} {unit}) | Shopping
            list: {count} {unit} of {item} | I'm out of {item}, get {count} {unit} | put {count} {unit} of {item} on my
            groceries | note that we need {item}: {count} {unit} | buy {count} {unit} of {item} | Add to groceries:
            {item} {count} {unit} | grab {count} {unit} of {item} at the supermarket | remember {item} for the shop,
            {count} {unit} | There's no {item} left, add {count} {unit} | bring home {count} {unit} of {item} | We're
            low on {item}: {count} {unit} | list {count} {unit} of {item} under food | scribble {item}, {count} {unit},
            on the list
        """,
        held_out="""
            write {count} {unit} of {item} on the grocery list | include {item} in my shopping, {count} {unit} | We ran
            out of {item}, so {count} {unit} for the list | jot down {count} {unit} of {item} for the store | throw
            {count} {unit} of {item} into the basket
        """,
    ),
    Call(
        "send_message",
        "to:name text",
        train="""
            tell {to} that {text} | text {to}: {text} | send a message to {to} saying {text} | let {to} know {text} |
            write to {to} that {text} | message {to} "{text}" | send "{text}" to {to} | Message for {to}: {text} | say
            to {to} that {text} | inform {to} that {text} | I want {to} to know that {text} | forward to {to} that
            {text} | pm {to}: {text} | report to {to} that {text} | notify {to} that {text} | share with {to} that
            {text} | leave {to} a note saying {text} | The message "{text}" goes to {to} | {to} should hear that {text}
            | get word to {to} that {text}
        """,
        held_out="""
            drop {to} a line that {text} | shoot {to} a text saying {text} | pass on to {to} that {text} | Send {to}
            this: {text} | give {to} the message "{text}"
        """,
        settled={"urgent": False},
    ),
    Call(
        "send_message",
        "to:name text",
        train="""
            urgently tell {to} that {text} | send an urgent message to {to}: {text} | text {to} at once that {text} |
            Urgent! Let {to} know {text} | immediately write to {to} that {text} | It's urgent, tell {to} {text} |
            message {to} right now: {text} | Emergency, text {to} that {text} | send "{text}" to {to}, it is urgent |
            as fast as possible, inform {to} that {text} | mark as urgent and send to {to}: {text} | alert {to}
            immediately: {text} | Top priority, tell {to} that {text} | This can't wait, write {to}: {text} | Urgent
            for {to}: {text} | {to} must hear at once that {text} | rush an urgent text to {to}: {text}
        """,
        held_out="""
            send {to} an urgent note that {text} | Urgent message for {to}: {text} | immediately inform {to}: {text} |
            Very urgent: {to} needs to learn that {text}
        """,
        settled={"urgent": True},
    ),
    Call(
        "book_table",
        "place people date time",
        train="""
            book a table at {place} for {people} on {date} at {time} | reserve {place} for {people}, {date}, {time} |
            get us a table for {people} at {place}, {date} at {time} | I'd like to eat at {place} on {date} at {time},
            {people} people | Table for {people} at {place}, {time} on {date} | make a reservation at {place} on
            {date}, {time}, {people} people | On {date} at {time} we are {people} at {place}, book it | We want a table
            at {place} at {time} on {date} for {people} | Reservation: {place}, {date}, {time}, {people} guests | find
            a table for {people} on {date} at {time} at {place} | request seats at {place}, {date}, {time}, {people}
            people | secure a spot at {place} for {people} at {time} on {date} | We are {people}, we come to {place} on
            {date} at {time}, book | call {place} and book for {people} on {date} at {time} | Lunch at {place},
            {people} people, {date}, {time} | {place} for {people} on {date} at {time} | plan dinner at {place} with
            {people} people, {date} at {time} | tell {place} that {people} guests come on {date} at {time} | Is {place}
            free on {date} at {time} for {people}, then book | keep {people} chairs at {place} on {date} from {time}
        """,
        held_out="""
            arrange a table for {people} at {place} on {date}, {time} | save us {people} seats at {place} at {time} on
            {date} | A party of {people} at {place} on {date} around {time} | hold a table at {place} for {date},
            {time}, for {people} persons | There will be {people} of us at {place}, {date}, {time}, so reserve
        """,
    ),
    Call(
        "convert",
        "amount from-to:units",
        train="""
            convert {amount} {from} to {to} | What is {amount} {from} in {to} | How many {to} are {amount} {from} |
            turn {amount} {from} into {to} | I have {amount} {from}, what is that in {to} | {amount} {from} to {to} |
            change {amount} {from} to {to} | tell me {amount} {from} in {to} | In {to}, how much is {amount} {from} |
            How much is {amount} {from} in {to} | express {amount} {from} as {to} | {amount} {from}, how many {to} is
            that | compute {amount} {from} in {to} | I need {amount} {from} expressed in {to} | translate {amount}
            {from} to {to} | show {amount} {from} as {to}
        """,
        held_out="""
            give me the value of {amount} {from} in {to} | work out how many {to} make {amount} {from} | If something
            is {amount} {from}, what would it be in {to} | calculate {amount} {from} in {to} | switch {amount} {from}
            over to {to}
        """,
    ),
    Call(
        "remind",
        "task date time",
        train="""
            remind me to {task} on {date} at {time} | on {date} at {time} remind me to {task} | set a reminder to
            {task}, {date}, {time} | I must {task} on {date} at {time}, remind me | don't let me forget to {task} at
            {time} on {date} | Reminder for {date}, {time}: {task} | ping me on {date} at {time} to {task} | {task} on
            {date} at {time}, remind me | make sure I {task} on {date} at {time} | At {time} on {date} I have to
            {task}, so remind me | I need to {task} by {time} on {date}, don't let me forget | Note to self: {task} on
            {date} at {time} | notify me at {time} on {date} so that I {task} | schedule for {date}, {time}: {task} |
            put it in my calendar to {task} on {date} at {time} | tell me to {task} on {date} at {time} | New reminder:
            {task}, {date}, {time} | I want to {task} on {date} at {time}, set a reminder | warn me at {time} on
            {date}, I have to {task} | It matters that I {task} on {date} at {time}, ping me | beep me on {date},
            {time}, since I need to {task}
        """,
        held_out="""
            help me remember to {task} on {date} at {time} | create a reminder for {time} on {date}: {task} | I have to
            remember to {task}, it is for {date}, {time} | nudge me at {time} on {date} to {task} | Alert me on {date},
            {time}, because I should {task}
        """,
    ),
    Call(
        "find_train",
        "from:city to:city date",
        train="""
            find a train from {from} to {to} on {date} | I need to get from {from} to {to} on {date} by train | Trains
            to {to} from {from}, {date} | show me trains from {from} to {to} for {date} | On {date} I travel from
            {from} to {to}, which train | How do I get to {to} by train on {date}, starting in {from} | Train {from} -
            {to}, {date} | look up the {date} train from {from} to {to} | I leave {from} on {date} for {to}, find a
            train | Is there a train to {to} on {date} from {from} | I want to travel to {to} on {date}, leaving from
            {from} | check trains {from} to {to}, {date} | plan a rail trip from {from} to {to} on {date} | When does a
            train leave {from} for {to} on {date} | I'm going to {to} on {date}, starting from {from}, by train | Train
            timetable {from} to {to} for {date} | {from} to {to} on {date}, by rail
        """,
        held_out="""
            search rail connections from {from} to {to} on {date} | Which trains go from {from} to {to} on {date} | I'm
            in {from} and have to be in {to} on {date}, check the trains | get me a train to {to} leaving {from} on
            {date}
        """,
    ),
]
# The ways to write a unit; the first word is the unit in a call.
SPELLED = """
    s seconds sec secs | min minutes min mins | h hours h hrs | kg kg kilos kilograms | g g grams | l litres
    liters l | ml ml millilitres | pack packs packets | bag bags sacks | box boxes | jar jars | km km kilometres
    kilometers | m metres meters m | cm cm centimetres | mi miles | ft feet ft | in inches | lb pounds lb | oz ounces
    oz | gal gallons
"""
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def split(words: str, by: str = ",") -> list[str]:
    return [word.strip() for word in " ".join(words.split()).split(by)]


UNITS = {entry.split()[0]: entry.split()[1:] for entry in split(SPELLED, "|")}


def is_held_out(*numbers: float) -> bool:
    """The part a number, a date or a time belongs to, by the sum of its digits: one in four is held out."""
    return sum(int(digit) for number in numbers for digit in f"{number:g}" if digit != ".") % 4 == 3


class Draw:
    """Draws what a slot may say in one part, each kind of slot by the method of its name: (as said, as argument)."""

    def __init__(self, rng: Random, held_out: bool) -> None:
        self.rng, self.held_out, self.pools = rng, held_out, HELD_OUT if held_out else TRAIN

    def slot(self, slot: str) -> dict[str, tuple[str, Any]]:
        argument, _, kind = slot.partition(":")
        kind = kind or argument
        if kind in self.pools and kind != "units":
            said = self.pick(kind)
            return {argument: (said, said)}
        drawn = getattr(self, kind)()
        return dict(zip(argument.split("-"), drawn, strict=True)) if "-" in argument else {argument: drawn}

    def pick(self, pool: str) -> str:
        return " ".join(self.rng.choice(split(words)) for words in self.pools[pool].split("/"))

    def ours(self, choose: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        while is_held_out(*(numbers := choose())) != self.held_out:
            pass
        return numbers

    def whole(self, top: int) -> tuple[str, int]:
        (number,) = self.ours(lambda: (self.rng.randint(2, top),))
        return str(number), number

    def people(self) -> tuple[str, int]:
        said, number = self.whole(12)
        return (NUMBERS[number] if self.rng.random() < 0.4 else said), number

    def amount(self) -> tuple[str, float]:
        (number,) = self.ours(lambda: (self.rng.randint(2, 999) / self.rng.choice([1, 10, 10, 100]),))
        return f"{number:g}", number

    def unit(self, key: str) -> tuple[str, str]:
        return self.rng.choice(UNITS[key]), key

    def units(self) -> tuple[tuple[str, str], ...]:
        return tuple(self.unit(key) for key in self.pick("units").split())

    def period(self) -> tuple[tuple[str, int], tuple[str, str]]:
        key, top = self.rng.choice([("s", 99), ("min", 20), ("min", 99), ("h", 24)])
        return self.whole(top), self.unit(key)

    def measure(self) -> tuple[tuple[str, int], tuple[str, str]]:
        key, top = self.rng.choice([("kg", 30), ("g", 950), ("pack", 30), ("bag", 12), ("box", 30), ("jar", 12)])
        return self.whole(top), self.unit(key)

    def date(self) -> tuple[str, str]:
        month, day = self.ours(lambda: (self.rng.randint(1, 12), self.rng.randint(1, 28)))
        name = calendar.month_name[month]
        th = {1: "st", 2: "nd", 3: "rd"}.get(day if day < 20 else day % 10, "th")
        forms = [f"{name} {day}", f"{day} {name}", f"{name} {day}{th}", f"the {day}{th} of {name}", f"{name[:3]} {day}"]
        return self.rng.choice(forms), f"{YEAR}-{month:02}-{day:02}"

    def time(self) -> tuple[str, str]:
        minutes = [0, 0, 0, 15, 30, 30, 45, *range(5, 60, 5)]
        hour, minute = self.ours(lambda: (self.rng.randint(6, 23), self.rng.choice(minutes)))
        said = [f"{hour}:{minute:02}", f"{hour:02}:{minute:02}", f"{hour}.{minute:02}", f"{hour}h{minute:02}"]
        return self.rng.choice(said), f"{hour:02}:{minute:02}"

    def record(self, call: Call) -> dict[str, str]:
        slots = {name: drawn for slot in call.slots.split() for name, drawn in self.slot(slot).items()}
        while call.tool == "find_train" and slots["from"] == slots["to"]:
            slots |= self.slot("to:city")
        wording = self.rng.choice(split(call.held_out if self.held_out else call.train, "|"))
        prompt = wording.format_map({name: said for name, (said, _) in slots.items()})
        if wording[0].islower() and self.rng.random() < 0.5:
            prompt = f"{self.pick('openings')} {prompt}"
        elif wording[0].isupper() and wording[:2] not in ("I ", "I'") and self.rng.random() < 0.5:
            prompt = prompt[0].lower() + prompt[1:]
        if not wording.endswith(("text}", "task}")):  # where free text ends the request, a closing would join it
            prompt += f", {self.pick('closings')}" if self.rng.random() < 0.25 else ""
        if self.rng.random() < 0.5:
            mark = "?" if wording.startswith(("What", "How", "Is", "Which")) else "."
            prompt = prompt[0].upper() + prompt[1:] + ("" if prompt.endswith(("?", '"')) else mark)
        args = {name: value for name, (_, value) in slots.items()} | call.settled
        return {
            "prompt": prompt,
            "completion": json.dumps({"tool": call.tool, "args": args}, ensure_ascii=False, separators=(",", ":")),
        }


def generate(count: int, *, seed: int, held_out: bool) -> list[dict[str, str]]:
    """`count` different records of one part, every tool equally often, in random order; the same for the same seed."""
    rng = Random(f"{seed} {held_out}")
    draw = Draw(rng, held_out)
    tools = list(dict.fromkeys(call.tool for call in CALLS))
    records: dict[str, dict[str, str]] = {}
    for _ in range(20 * count):
        if len(records) < count:
            tool = tools[len(records) % len(tools)]
            record = draw.record(rng.choice([call for call in CALLS if call.tool == tool]))
            records.setdefault(record["prompt"].casefold(), record)
    if len(records) < count:
        raise ValueError(f"{count} different records were asked for, only {len(records)} were found")
    return rng.sample(list(records.values()), count)


def write(folder: Path, *, train: int, held_out: int, seed: int) -> None:
    """Writes train.jsonl and test.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, part in (("train", train, False), ("test", held_out, True)):
        lines = [json.dumps(record, ensure_ascii=False) for record in generate(count, seed=seed, held_out=part)]
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes train.jsonl and test.jsonl: requests and strict JSON calls.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--train", type=int, default=1200, help="training records (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=240, help="held-out records (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.out, train=options.train, held_out=options.held_out, seed=options.seed)
    print(f"{options.out}: {options.train} records in train.jsonl, {options.held_out} in test.jsonl")


if __name__ == "__main__":
    main()
