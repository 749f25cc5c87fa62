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
import re
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
        babysitter, Judge Cole, Wojciech, Thaddeus, Siobhan, Ngozi, Akira Tanaka, Dr Papadopoulos, Mr Szymanski, Ms Xu,
        Aunt Beatrice, Uncle Jim, Captain Ortega, Sister Agnes, the dentist, the accountant, my sister-in-law,
        Anne-Sophie, Karl-Heinz, Mary Jane, O'Brien, the caretaker, Guillermo, Björn, Zsófia, Agnieszka, Dr van Dijk,
        Prof Nakamura, Mr and Mrs Lee, the chess club, Ottilie, Evangeline, Rasmus, Tatiana, Ulrike, Giovanni, Mbali,
        Jia Hui, Lord Ashby, the vet, Eun-ji, Roderick
    """,
    "item": """
        rice, flour, oat bran, green apples, brown sugar, coffee, black tea, tomatoes, red onions, salt, yogurt,
        cheddar, penne, olives, dog food, paper towels, soap, oranges, walnuts, honey, spinach, carrots, candles,
        minced beef, frozen peas, sea bass, basmati, tofu, chickpeas, cocoa, raisins, batteries, toothpaste, pine nuts,
        potatoes, rice noodles, mango chutney, baking powder, lemons, cat litter, avocados, blueberries, cream,
        crackers, cucumbers, dates, figs, foil, grapes, hazelnuts, ketchup, leeks, light bulbs, napkins, nutmeg,
        peppers, plums, pumpkin, radishes, ricotta, sponges, sugar cubes, tuna, waffles, yeast, beetroot, clams,
        pretzels, muesli, kiwis, wholemeal spaghetti, maple syrup, lamb chops, star anise, paprika, sauerkraut,
        gnocchi, parsley, hazelnut spread, toilet cleaner, sparkling water, vanilla pods, chorizo, mozzarella,
        artichokes, eggplants, tortillas, coconut milk, birdseed, dishwasher tablets, cinnamon, ravioli, sardines,
        polenta, buckwheat, poppy seeds, mustard, strawberries, haricot beans, cranberry juice
    """,
    "city": """
        Paris, Berlin, Madrid, Rome, Vienna, Prague, Warsaw, Lyon, Hamburg, Turin, Geneva, Zurich, Brussels, Antwerp,
        Oslo, Bergen, Malmo, Leeds, York, Glasgow, Ghent, Bruges, Graz, Linz, Bern, Rouen, Lille, Nantes, Toulouse,
        Porto, Seville, Naples, Krakow, Budapest, Bucharest, Sofia, Athens, Granada, Bilbao, The Hague, Stuttgart,
        Amsterdam, Arnhem, Augsburg, Bologna, Bonn, Brno, Cadiz, Cardiff, Cork, Dresden, Essen, Gothenburg, Innsbruck,
        Leipzig, Lucerne, Lodz, Malaga, Metz, Nuremberg, Odense, Padua, Pisa, Reims, Riga, Split, Trieste, Uppsala,
        Verona, Vigo, Tampere, Thessaloniki, Reykjavik, Szczecin, Dubrovnik, Klagenfurt, Eindhoven, Groningen,
        Maastricht, Wolfsburg, Chemnitz, Kaunas, Vilnius, Tallinn, Tartu, Bratislava, Maribor, Rijeka, Zadar, Sarajevo,
        Skopje, Tirana, Podgorica, Plovdiv, Varna, Patras, Cluj-Napoca, San Marino, Santiago, Aix-en-Provence, Le Mans,
        La Rochelle, Newcastle, Winterthur, Saarbrucken, Bielefeld, Perugia, Ancona, Siena, Mantua, Avignon, Besancon,
        Dijon, Coimbra, Braga, Evora, Zaragoza, Pamplona, Cordoba, Almeria, Wroclaw, Poznan, Katowice, Ostrava,
        Olomouc, Debrecen, Szeged, Trondheim, Stavanger, Aarhus, Aalborg, Linkoping, Norwich, Swansea, Aberdeen,
        Inverness, Galway, Limerick, Leuven, Namur, Heerlen
    """,
    "label": """
        pasta, eggs, laundry, yoga, nap, the pizza, tea, cooking, piano practice, bread dough, meditation, the roast,
        push-ups, knitting, the washing machine, chess, face mask, plank, rice cooker, break, stretching, the cake,
        parking, the oven, game night, hair dye, a power nap, sauna, guitar, French lesson, waffles, boiling potatoes,
        tennis, the quiz, my turn, a walk, drum solo, juggling, vocabulary, rest, the sauce, the steak, burpees,
        debate, exam, the puzzle, dishes, email, the kettle, vacuuming, cold brew, bath time, poker, rowing, sketching,
        the muffins, hula hoop, choir, tidying up, frying onions, bouldering, the casserole, handstands, the
        croissants, calligraphy, homework help, pottery, the slow cooker, archery, paint drying, the risotto, a cat
        nap, interval run, trumpet, the dumplings, gymnastics, unboxing, marinating the fish, origami, the lawn
        sprinkler, warm-up, a radio show, woodworking, the baked beans, spelling
    """,
    "place": """
        Blue, Golden, Old, Little, Silver, Green, Casa, Villa, Royal, Happy, Lazy, Red, Wild, Chez, Grand, Amber,
        Black, Brave, Café, Central, Copper, Crystal, Eastern, Fat, Hungry, Iron, Jade, Jolly, Lone, Misty, Modern,
        Noble, Osteria, Purple, Quiet, Rose, Secret, Stone, Tiny, Twin, Urban, Velvet, Western, Yellow, Ancient,
        Bitter, Blind, Broken, Cosy, Dancing, Drunken, Electric, Emerald, Flying, Gilded, Humble, Italian, Ivory,
        Laughing, Mighty, Naked, Orange, Patient, Polished, Rolling, Scarlet, Singing, Sleepy, Smoky, Spicy, Three,
        Upper, Vintage, Wandering, Wicked, Pizzeria, Taverna, Bodega, El, La / Lantern, Spoon, Mill, Garden, Fox,
        Harbour, Luna, Verde, Palace, Dragon, Olive, Barrel, Rosa, Tavern, Table, Bakery, Bear, Castle, Corner, Crab,
        Diner, Falcon, Goose, Grill, Kitchen, Lemon, Lobster, Moon, Pasta, Pearl, Ship, Terrace, Tiger, Willow, Acorn,
        Armadillo, Balcony, Bottle, Buffalo, Cactus, Camel, Chimney, Cinnamon, Compass, Donkey, Farm, Fig, Hedgehog,
        Jasmine, Lagoon, Lighthouse, Mango, Monk, Mulberry, Nightingale, Oyster, Paprika, Peacock, Piano, Rabbit,
        Saffron, Salmon, Sparrow, Stable, Sombrero, Truffle, Turtle, Vineyard, Walrus, Windmill
    """,
    "task": """
        pick up, order, check, clean, return, pack, wash, look at, pay for, ask about, move, photograph, renew, find,
        fix, paint, print, mention, deliver, test, borrow, hide, unpack, send back, replace, polish, sharpen, scan,
        label, carry in, hang up, iron, dust, charge, insure, weigh, sign, swap, look for, give away, tidy, cover, oil,
        count / the parcel, my suit, the bike, the car keys, dad's present, the concert tickets, the blue jacket, the
        new desk, library books, the garden hose, the tent, two chairs, the printer, my passport, the filters, Emma's
        laptop, the rental car, winter tyres, the window blinds, the birthday cake, a spare key, the fridge, school
        uniforms, the wine glasses, my medicine, the camera bag, a new battery, the ladder, the heating, Dad's watch,
        the tax forms, my contact lenses, the bookshelf, Lea's skis, the balcony door, running socks, the dog leash,
        the blender, the invoices, all plates, the piano, the snow shovel, grandpa's hearing aid, Ida's rucksack, the
        kitchen scale, eleven postcards, the insurance papers, my climbing shoes, the hallway lamp, the yoga mats, a
        train pass, the lawnmower, our wedding photos, the guest towels, the mousetrap, the cello bow, the chess set,
        Karim's jacket, a phone charger, the roof tiles, my vaccination card, the pantry shelf, some wrapping paper
    """,
    "text": """
        the meeting, dinner, my flight, the bus, the parcel, lunch, the match, our lesson, the doctor, the car, the
        report, grandma, the new printer, the house, my phone, the interview, the cake, everyone, the contract, the
        train, my cousin, the new kitchen, pizza, the surgery, the neighbour, work, training, our hotel, the answer,
        the boat, class, Sarah, the ticket, the party / is late, is ready, was cancelled, has moved to room B, is on
        the way, looks great, needs more time, will be fine, is at the office, starts soon, has arrived, is next to the
        station, is not here yet, was fun, got delayed, has to wait until tomorrow, is really loud, has begun, works
        again, is sold out, costs too much, went home, can be picked up, is broken, sounds strange, was easy, ends at
        the lake, is asleep already, needs help, leaves without us, is fully booked, tastes awful, smells of smoke, is
        parked outside, won the prize, takes longer than planned, is on page nine, must be paid by Friday, is in the
        garden, was a surprise, is closed on Mondays, doesn't fit, runs smoothly, arrived damaged, is booked for two
        nights, is cheaper online, got lost in the post, is worth it, begins at nine, feels much better
    """,
    "units": """
        km mi, mi km, kg lb, lb kg, cm in, in cm, l gal, gal l, m ft, oz g, km m, kg g, g lb, ft mi, cm m, in ft, ml l,
        mi ft, g oz, lb oz
    """,
}
HELD_OUT = {
    "openings": "kindly, would you, good morning! could you please, I'd love you to, be so kind and, time to",
    "closings": "cheers, if possible, that would be great, will you?",
    "name": """
        Adele, Bertrand, Celia, Dmitri, Emeka, Fiona, Gunnar, Helena, Ismail, Joanna, Kofi, Lucia, Magnus, Nora, Omar,
        Philippa, Rahul, Sven, Tariq, Uncle Ted, Mrs Castellano, Prof Dubois, the gardener, Rose-Marie, Daiki, Sunhee
    """,
    "item": """
        bagels, apricots, margarine, plum jam, celery, barley, gummy bears, truffles, granola, melons, mussels, smoked
        ham, pumpkin seeds, baby carrots, chicken wings, fabric softener, broccoli, feta, bulgur, ice cubes, rhubarb
    """,
    "city": """
        Manchester, Liverpool, Marseille, Strasbourg, Stockholm, Copenhagen, Hanover, Bremen, Brescia, Genoa, Oxford,
        Cambridge, Lausanne, Oviedo, Murcia, Kiel, Rostock, Mainz, Belgrade, Delft, Salamanca
    """,
    "label": """
        ramen, swimming, the dishwasher, stew, flute, lunges, the cookies, a bath, team meeting, focaccia, the kiln,
        judo, audiobook, gardening, the turkey, standup, mashed turnips, sudoku
    """,
    "place": """
        Bronze, Forgotten, Merry, Petite, Southern, Dusty, Cloudy, Ristorante, Pink / Bridge, Brasserie, Attic,
        Giraffe, Teapot, Lotus, Tulip, Chili, Pelican
    """,
    "task": """
        purchase, mend, decorate, rent, examine, assemble, fetch, recycle / the cracked mirror, Nick's drum kit, rubber
        boots, the carpets, our mattress, the bird cage, the vacuum, holiday slides, the baby shower gift, the towbar,
        my raincoat, four cushions, the tumble dryer
    """,
    "text": """
        the lecture, supper, the ferry, my uncle, our plumber, the essay, the delivery, the seminar, the puppy, the
        lift, rehearsal, my manager / has finished, was called off, is under repair, seems perfect, departs from gate
        five, turned out great, stands at the door, stays home today, is nearly finished, needs paint, is still awake
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
            doing {label} for {duration} {unit}, time me | track {duration} {unit} of {label} | alarm me in {duration}
            {unit}, it is about {label} | notify me after {duration} {unit} of {label} | {label} needs {duration}
            {unit}, watch the clock | wake me after {duration} {unit}, I'm on {label} | In {duration} {unit} tell me to
            stop {label} | For {label}, wait {duration} {unit} and then beep | Stopwatch: {duration} {unit} ({label}) |
            {duration} {unit}. {label}. Go | make it {duration} {unit} for {label} | buzz when {label} has lasted
            {duration} {unit} | book {duration} {unit} of {label} on the timer | {label} takes {duration} {unit}, warn
            me then | Let {label} go on for {duration} {unit} and alert me | How about {duration} {unit} on the timer
            for {label} | keep an eye on {label} for {duration} {unit} | activate the kitchen timer, {label},
            {duration} {unit} | measure {duration} {unit} for {label} | launch {label} with {duration} {unit}
        """,
        held_out="""
            launch a clock of {duration} {unit} named {label} | hit the stopwatch for {label}, {duration} {unit} |
            chime once {duration} {unit} of {label} are up | Timing please: {label}, {duration} {unit} | Give a signal
            {duration} {unit} from now, {label} is finished then
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
            on the list | pick up {count} {unit} of {item} | shop for {item}, {count} {unit} | {count} {unit} of
            {item}, don't forget them | order {count} {unit} {item} | There should be {count} {unit} of {item} on the
            list | I want to buy {item}: {count} {unit} | Tomorrow's shopping: {item} ({count} {unit}) | Another
            {count} {unit} of {item} is needed | make a note: {count} {unit}, {item} | How about {count} {unit} of
            {item} for the list | Send {count} {unit} of {item} to my shopping list | extend the list by {count} {unit}
            of {item} | Is {item} on the list? I need {count} {unit} | reserve space on the list for {count} {unit} of
            {item} | get {item}, exactly {count} {unit} | top up {item} by {count} {unit} | The cupboard has no {item},
            so get {count} {unit} | stock up on {item}, {count} {unit}
        """,
        held_out="""
            stick {count} {unit} of {item} on the list | have {item} on the next shopping trip, {count} {unit} |
            Groceries should include {count} {unit} of {item} | save {count} {unit} of {item} under shopping | My
            basket still lacks {item}: {count} {unit}
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
            | get word to {to} that {text} | reply to {to} that {text} | Can {to} be told that {text} | mail {to}:
            {text} | whisper to {to} that {text} | remind {to} that {text} | My words to {to}: {text} | contact {to}
            and say {text} | sms {to} {text} | update {to}: {text} | explain to {to} that {text} | note for {to}:
            {text} | Tell {to} this: {text} | I have news for {to}, {text} | announce to {to} that {text} | New
            message, {to}: {text} | When convenient, tell {to} that {text} | No hurry, but {to} should know that {text}
            | answer {to} with "{text}" | post to {to}: {text} | ask for {to} and report that {text} | quote me to
            {to}: "{text}" | confirm to {to} that {text} | warn {to} that {text} | alert {to} that {text} | call out to
            {to} that {text} | hand {to} the news that {text} | send {to} word that {text} | ring {to} and say {text} |
            give {to} a heads-up that {text} | relay to {to}: {text} | write {to} a postcard that {text} | mention to
            {to} that {text} | put down for {to}: {text} | type to {to}: {text} | let {to} read "{text}" | send {to} an
            e-mail saying {text} | For {to}, a message: {text} | bring {to} the news that {text} | dm {to} that {text}
            | send {to} a note: {text} | pop {to} a message, {text} | make sure {to} knows {text} | deliver to {to}:
            "{text}" | I'd like {to} to hear {text} | fill {to} in: {text} |
            put {to} in the picture: {text} | drop {to} a line that {text} | Please have {to} read this: {text}
        """,
        held_out="""
            pass the word to {to} that {text} | fire off a text to {to}: {text} | communicate to {to} that {text} |
            Kindly let {to} in on this: {text} | beam "{text}" over to {to}
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
            As fast as possible, inform {to} that {text} | mark as urgent and send to {to}: {text} | alert {to}
            immediately: {text} | Top priority, tell {to} that {text} | This can't wait, write {to}: {text} | Urgent
            for {to}: {text} | {to} must hear at once that {text} | rush an urgent text to {to}: {text} | ASAP: tell
            {to} {text} | tell {to} now, without delay, that {text} | Quickly, {to} must read this: {text} | It's an
            emergency, message {to} that {text} | Hurry, inform {to} that {text} | High priority message for {to}:
            {text} | This second, text {to} that {text} | {text}, tell {to} urgently | URGENT {to}: {text} | warn {to}
            urgently that {text} | flag it urgent and write {to} that {text} | don't wait, let {to} know {text} | {to}
            has to know right away that {text} | send {to} "{text}" with urgency | instantly report to {to} that {text}
            | Urgent mail to {to}, {text} | remind {to} immediately that {text} | Critical! {to} should know {text}
        """,
        held_out="""
            text {to} with top urgency: {text} | Urgent news for {to}, {text} | straight away, let {to} learn that
            {text} | This is urgent: {to} ought to hear that {text}
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
            free on {date} at {time} for {people}, then book | keep {people} chairs at {place} on {date} from {time} |
            We would like to dine at {place}, {people} people, {date}, {time} | {people} of us want to eat at {place}
            on {date} at {time} | ask {place} for a table, {people} people, {date} {time} | I need seats for {people}
            at {place} on {date} at {time} | {date}, {time}, {place}, {people} people: book | put us down at {place},
            {date}, {time}, {people} of us | Brunch for {people} at {place} on {date}, {time} | {people} friends meet
            at {place} on {date} at {time}, get a table | order a table: {place}, {people} guests, {date}, {time} | My
            birthday is at {place}, {people} guests, {date} at {time} | On {date} get {people} places at {place} for
            {time} | At {time} on {date} we eat at {place}, {people} of us | schedule dinner at {place} for {people} on
            {date}, {time} | Could {place} seat {people} on {date} at {time} | We'd be {people} at {place}, {date}
            {time} | pick a table for {people} in {place}, {time}, {date} | set up a meal for {people} at {place} on
            {date} at {time} | Remember {place} for {people}, I need it booked on {date} at {time} | try {place} on
            {date}, table for {people}, {time} | {place} wants to know how many: {people}, on {date} at {time}
            | arrange a table at {place} for {people}, {date}, {time} | hold a table at {place} for {people}, on {date},
            {time} | grab {people} seats at {place}, {time}, {date} | take {people} chairs at {place}, {time}, {date} |
            Dinner at {place} for {people}, {date}, {time}
        """,
        held_out="""
            fix a table at {place} for {people}, on {date}, {time} | organise a meal at {place} for {people} persons at
            {time} on {date} | A group of {people} will dine at {place}, {date}, {time} | claim {people} seats at
            {place}, {time}, {date} | Supper at {place} for {people}, the day is {date}, the hour {time}
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
            {from} to {to} | show {amount} {from} as {to} | {amount} {from} in {to} | {amount} {from} equals how many
            {to} | tell how many {to} fit in {amount} {from} | Is {amount} {from} a lot in {to} | My scale says
            {amount} {from}, I want {to} | It is {amount} {from}, say it in {to} | The sign says {amount} {from},
            what's that in {to} | put {amount} {from} into {to} | write {amount} {from} in {to} | {amount} {from} = ?
            {to} | find {amount} {from} in {to} | From {from} to {to}: {amount} | Conversion of {amount} {from} to {to}
            | I measured {amount} {from} but need {to} | get {to} from {amount} {from} | read {amount} {from} as {to} |
            count {amount} {from} in {to}
        """,
        held_out="""
            figure out {amount} {from} in {to} | how would you say {amount} {from} in {to} | If it measures {amount}
            {from}, how many {to} is it | display {amount} {from} using {to} | bring {amount} {from} over to {to}
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
            {time}, since I need to {task} | On {date}, {time}, tell me I have to {task} | I have to {task} on {date}
            at {time}, set an alarm | make a reminder: {task}, {date}, {time} | alert me at {time} on {date} to {task}
            | ring me on {date} at {time} to {task} | {date} {time}: {task}, keep me on it | To do on {date} at {time}:
            {task} | I plan to {task} on {date} at {time}, send a reminder | wake me at {time} on {date}, I want to
            {task} | call my attention on {date} at {time} to {task} | Calendar, {date}, {time}: {task} | I might not
            think of it: {task}, {date}, {time} | At {time} on {date} say to me: {task} | message me on {date} at
            {time} to {task} | book {time} on {date} to {task} | add a reminder on {date} at {time} to {task} | let me
            know on {date} at {time} that I must {task} | On {date} I should {task}, ping at {time} | keep {date},
            {time} in mind: {task} | I promised to {task} on {date} at {time}, remind me | It is on {date} at {time}
            that I need to {task}
        """,
        held_out="""
            see to it that I remember to {task}, {date}, {time} | drop me a reminder to {task} at {time} on {date} | I
            am supposed to {task} on {date} at {time}, jog my memory | prompt me on {date} at {time}: {task} | Let a
            reminder go off on {date}, {time}, for me to {task}
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
            timetable {from} to {to} for {date} | {from} to {to} on {date}, by rail | book me by rail {from} to {to},
            {date} | From {from} I go to {to} on {date}, what runs | Rail options on {date}, {from} to {to} | What
            leaves {from} for {to} on {date} | take me from {from} to {to} by train on {date} | On {date} get me to
            {to} from {from} | I have to reach {to} on {date}, starting from {from} | Any trains on {date} between
            {from} and {to} | tell me the trains from {from} to {to} on {date} | We go by rail to {to} on {date}, from
            {from} | {date}: {from} to {to}, which trains | list departures from {from} to {to} on {date} | Need a ride
            by train, {from} to {to}, {date} | My trip is {from} to {to} on {date}, see the timetable | Departing
            {from}, arriving {to}, {date} | Next train on {date}: {from} to {to} | What's the connection to {to} on
            {date} from {from} | travel plan for {date}, {from} to {to} | I'd go to {to} from {from} on {date}, by
            train | get the train times, {from} to {to}, on {date} | bring up the timetable, {from} to {to}, {date} |
            pull up departures, {from} to {to}, for {date} | search rail links between {from} and {to}, {date} | study
            the railway plan, {from} to {to}, on {date} | grab the list of trains, {from} to {to}, {date}
        """,
        held_out="""
            browse trains between {from} and {to}, {date} | What rail services run from {from} to {to} on {date} | I
            set off from {from} on {date}, my goal is {to}, search a train | fetch the rail schedule, {from} to {to},
            on {date}
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
# How often a training value is coined instead of drawn from its pool, so that copying is learned, not the pool.
COINED = {"name": 0.2, "city": 0.25, "place": 0.3, "item": 0.2, "label": 0.2}
SYLLABLES = """
    b, br, c, ch, d, dr, f, fl, g, gl, h, j, k, kl, l, m, n, p, pl, qu, r, s, sh, st, t, th, tr, v, w, z / a, e, i, o, u,
    ai, ea, ee, oo, ou / l, ll, m, n, nd, r, rk, rt, s, ss, t, v, x, ck, nt, bb
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
        self.coins = {} if held_out else COINED

    def slot(self, slot: str) -> dict[str, tuple[str, Any]]:
        argument, _, kind = slot.partition(":")
        kind = kind or argument
        if kind in self.pools and kind != "units":
            said = self.coined(kind) if self.rng.random() < self.coins.get(kind, 0) else self.pick(kind)
            return {argument: (said, said)}
        drawn = getattr(self, kind)()
        return dict(zip(argument.split("-"), drawn, strict=True)) if "-" in argument else {argument: drawn}

    def coined(self, kind: str) -> str:
        """A value of no pool: an invented word, or one that belongs elsewhere."""
        if self.rng.random() < 0.5:
            word = "".join(self.rng.choice(split(part)) for part in SYLLABLES.split("/") * self.rng.choice([1, 2]))
        else:
            word = self.rng.choice([w for pool in COINED for w in re.findall(r"\w{4,}", self.pools[pool])])
        if kind in ("item", "label"):
            return f"{word.lower()} {self.pick('item')}" if self.rng.random() < 0.3 else word.lower()
        return f"{word.capitalize()} {self.pick(kind).split()[-1]}" if kind == "place" else word.capitalize()

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
            calls = [call for call in CALLS if call.tool == tool]
            record = draw.record(rng.choices(calls, [len(split(call.train, "|")) for call in calls])[0])
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
