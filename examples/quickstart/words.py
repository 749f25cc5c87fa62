"""The words of the quickstart's three parts, disjoint, by kind of slot; and the ways to write units and numbers."""


def split(words: str, by: str = ",") -> list[str]:
    return [word.strip() for word in " ".join(words.split()).split(by)]


# After a slash: any first word goes with any second one. Units: from, to.
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
        Jia Hui, Lord Ashby, the vet, Eun-ji, Roderick, Thabo, Aaliyah, Cillian, Esperanza, Folasade, Gwendolyn, Håkon,
        Isidora, Jürgen, Kalinda, Lorcan, Mehmet, Noor, Olumide, Qiang, Rhiannon, Sunniva, Tevita, Uchenna, Vasilisa,
        Wanjiru, Xochitl, Ye-jin, Zebedee, Abd al-Rahman, Mr Castellanos, Mrs Featherstone, Dr Lindqvist, Ms Adeyemi,
        Prof Ramanathan, Inspector Dubois, Father Malachy, Great-aunt Cordelia, Cousin Bartholomew, Papa, my flatmate,
        my godmother, the night shift, Saoirse McBride, Lakshmi Iyer, François Delacroix, Nguyen Van Thanh, Þórdís
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
        polenta, buckwheat, poppy seeds, mustard, strawberries, haricot beans, cranberry juice, kohlrabi, tahini, soy
        sauce, wasabi, crème fraîche, jalapeños, pak choi, sweetcorn, shallots, fennel bulbs, clementines, liquorice,
        oatcakes, sourdough rolls, brioche, halloumi, gruyère, buttermilk, ghee, anchovies, smoked mackerel, king
        prawns, prosciutto, merguez, kombucha, elderflower cordial, ginger ale, bin bags, clothes pegs,
        drain unblocker, sellotape, shoelaces, mosquito repellent, sunscreen, washing-up liquid, cotton buds, baby
        wipes
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
        Inverness, Galway, Limerick, Leuven, Namur, Heerlen, Kuressaare, Haapsalu, Daugavpils, Jelgava, Šiauliai,
        Panevėžys, Zakopane, Sandomierz, Kłodzko, Český Krumlov, Telč, Banská Štiavnica, Košice, Sopron, Kecskemét,
        Pécs, Sighișoara, Timișoara, Veliko Tarnovo, Ohrid, Mostar, Kotor, Šibenik, Ptuj, Bad Ischl, Bregenz,
        Rothenburg, Quedlinburg, Garmisch-Partenkirchen, Castrop-Rauxel, Schaffhausen, Bellinzona, Neuchâtel,
        Middelburg, Sint-Niklaas, Charleroi, Villefranche-sur-Mer, Carcassonne, Clermont-Ferrand, Albacete, Ciudad
        Real, Viana do Castelo, Matera, Brindisi, Ålesund, Örebro, Jyväskylä, Esbjerg, Kilkenny, Stratford-upon-Avon
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
        sprinkler, warm-up, a radio show, woodworking, the baked beans, spelling, crochet, fencing, pilates, zumba,
        jump rope, sit-ups, tai chi, sight-reading, karaoke, mindfulness, the lasagne, the brisket, the soufflé, the
        meringues, the flan, the hummus, pickling, ice bath, the dehumidifier, the bonfire, ironing, pruning, mopping,
        essay writing, speed reading, Japanese flashcards, mental arithmetic, charades, dominoes, Scrabble, penalty
        shootout, hot compress, foot soak, toothbrushing, stand-up comedy, sunbathing, kiln firing, leapfrog, the
        siesta, the espresso machine, Morse code, backgammon
    """,
    "place": """
        Blue, Golden, Old, Little, Silver, Green, Casa, Villa, Royal, Happy, Lazy, Red, Wild, Chez, Grand, Amber,
        Black, Brave, Café, Central, Copper, Crystal, Eastern, Fat, Hungry, Iron, Jade, Jolly, Lone, Misty, Modern,
        Noble, Osteria, Purple, Quiet, Rose, Secret, Stone, Tiny, Twin, Urban, Velvet, Western, Yellow, Ancient,
        Bitter, Blind, Broken, Cosy, Dancing, Drunken, Electric, Emerald, Flying, Gilded, Humble, Italian, Ivory,
        Laughing, Mighty, Naked, Orange, Patient, Polished, Rolling, Scarlet, Singing, Sleepy, Smoky, Spicy, Three,
        Upper, Vintage, Wandering, Wicked, Pizzeria, Taverna, Bodega, El, La, Turquoise, Cobalt, Mossy, Thirsty,
        Restless, Stubborn, Whispering, Galloping, Crooked, Frosty, Salty, Moonlit, Enchanted, Nordic, Bavarian,
        Sicilian, Andean, Gasthaus, Cantina, Maison, Zum, Half-Timbered, Bashful, Seven / Lantern, Spoon, Mill, Garden,
        Fox, Harbour, Luna, Verde, Palace, Dragon, Olive, Barrel, Rosa, Tavern, Table, Bakery, Bear, Castle, Corner,
        Crab, Diner, Falcon, Goose, Grill, Kitchen, Lemon, Lobster, Moon, Pasta, Pearl, Ship, Terrace, Tiger, Willow,
        Acorn, Armadillo, Balcony, Bottle, Buffalo, Cactus, Camel, Chimney, Cinnamon, Compass, Donkey, Farm, Fig,
        Hedgehog, Jasmine, Lagoon, Lighthouse, Mango, Monk, Mulberry, Nightingale, Oyster, Paprika, Peacock, Piano,
        Rabbit, Saffron, Salmon, Sparrow, Stable, Sombrero, Truffle, Turtle, Vineyard, Walrus, Windmill, Badger, Otter,
        Mongoose, Ibex, Raven, Kingfisher, Lynx, Porcupine, Ladle, Orchard, Courtyard, Cottage, Boathouse, Observatory,
        Carousel, Trombone, Thistle, Chestnut, Rosemary, Pomegranate, Nonna, Azteca, Bouillabaisse
    """,
    "task": """
        pick up, order, check, clean, return, pack, wash, look at, pay for, ask about, move, photograph, renew, find,
        fix, paint, print, mention, deliver, test, borrow, hide, unpack, send back, replace, polish, sharpen, scan,
        label, carry in, hang up, iron, dust, charge, insure, weigh, sign, swap, look for, give away, tidy, cover, oil,
        count, put away, drop off, take back, fold, sew up, glue, varnish, sand down, defrost, descale, vacuum, scrub,
        sterilise, disinfect, waterproof, air out, measure, photocopy, laminate, shred, retrieve, donate, auction off,
        lend out, exchange, upgrade, reserve, cancel, register, dismantle, mount, unscrew, tighten, adjust, calibrate,
        recharge, refill, throw out, sort through, catalogue, appraise, engrave / the parcel, my suit, the bike, the
        car keys, dad's present, the concert tickets, the blue jacket, the new desk, library books, the garden hose,
        the tent, two chairs, the printer, my passport, the filters, Emma's laptop, the rental car, winter tyres, the
        window blinds, the birthday cake, a spare key, the fridge, school uniforms, the wine glasses, my medicine, the
        camera bag, a new battery, the ladder, the heating, Dad's watch, the tax forms, my contact lenses, the
        bookshelf, Lea's skis, the balcony door, running socks, the dog leash, the blender, the invoices, all plates,
        the piano, the snow shovel, grandpa's hearing aid, Ida's rucksack, the kitchen scale, eleven postcards, the
        insurance papers, my climbing shoes, the hallway lamp, the yoga mats, a train pass, the lawnmower, our wedding
        photos, the guest towels, the mousetrap, the cello bow, the chess set, Karim's jacket, a phone charger, the
        roof tiles, my vaccination card, the pantry shelf, some wrapping paper, the pressure cooker, a dog bed, the
        accordion, my hiking poles, the trampoline, the sofa cushions, the chainsaw, the aquarium pump, her graduation
        gown, his cufflinks, the wheelbarrow, our picnic basket, the drill bits, the barometer, my prescription
        glasses, the espresso cups, Aunt Lotte's quilt, the doormat, a roll of carpet, the wardrobe mirror, the fire
        extinguisher, the smoke detector, the letterbox, the hedge trimmer, my ski goggles, the tripod, the projector,
        an antique typewriter, the record player, Mia's tricycle, the pram, the high chair, my season ticket, the
        residence permit, the warranty certificate, the jewellery box, the cuckoo clock, the garage remote, our camping
        stove, the sleeping bags, the punch bowl, the thermos flask, Mr Finch's umbrella, the surfboard, two hard
        drives, the microscope, some curtain rods, my résumé
    """,
    "text": """
        the meeting, dinner, my flight, the bus, the parcel, lunch, the match, our lesson, the doctor, the car, the
        report, grandma, the new printer, the house, my phone, the interview, the cake, everyone, the contract, the
        train, my cousin, the new kitchen, pizza, the surgery, the neighbour, work, training, our hotel, the answer,
        the boat, class, Sarah, the ticket, the party, the exhibition, our landlady, my nephew, the soup, the
        conference call, the presentation, the goalkeeper, our tax adviser, the conductor, the greenhouse, the wedding
        dress, the air conditioning, the excursion, Ferdinand, the new intern, the bathroom ceiling, the manuscript,
        the software update, the caterer, the fundraiser, the sourdough starter, my appointment, the minibus, the
        museum, somebody's umbrella / is late, is ready, was cancelled, has moved to room B, is on the way, looks
        great, needs more time, will be fine, is at the office, starts soon, has arrived, is next to the station, is
        not here yet, was fun, got delayed, has to wait until tomorrow, is really loud, has begun, works again, is sold
        out, costs too much, went home, can be picked up, is broken, sounds strange, was easy, ends at the lake, is
        asleep already, needs help, leaves without us, is fully booked, tastes awful, smells of smoke, is parked
        outside, won the prize, takes longer than planned, is on page nine, must be paid by Friday, is in the garden,
        was a surprise, is closed on Mondays, doesn't fit, runs smoothly, arrived damaged, is booked for two nights, is
        cheaper online, got lost in the post, is worth it, begins at nine, feels much better, is running behind
        schedule, was postponed indefinitely, turned out brilliantly, needs a second opinion, has been moved to
        Thursday, looks a bit suspicious, comes with a free gift, is waiting downstairs, can't be reached today, is
        leaking again, made it just in time, is out of action, will be back by noon, requires a signature, was left
        unattended, ran into trouble, is covered with snow, sounds promising, made us all laugh, is stuck at the
        border, has vanished without a trace, starts at a quarter past six, is better than we hoped, still smells of
        garlic, was sent to the wrong address, has passed the inspection, only lasts half an hour, deserves a round of
        applause, won't be available until spring, is heavier than it looks
    """,
    "units": """
        km mi, mi km, kg lb, lb kg, cm in, in cm, l gal, gal l, m ft, oz g, km m, kg g, g lb, ft mi, cm m, in ft, ml l,
        mi ft, g oz, lb oz
    """,
}
VALID = {
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
TEST = {
    "openings": "do me a favour and, hello there! please, go ahead and, your next job:, it would help to, assistant:",
    "closings": "much appreciated, if you don't mind, many thanks in advance, all right?",
    "name": """
        Annika, Boris, Camille, Desmond, Eleanor, Francesca, Gustavo, Hiroshi, Ingrid, Jamal, Katarina, Leopold,
        Mireille, Nikolai, Olga, Patrick, Renata, Sebastian, Theresa, Vincent, Uncle Albert, Mrs Henderson, Prof
        Lindqvist, the electrician, Marie-Claire, Yuki
    """,
    "item": """
        nectarines, butter, cauliflower, couscous, cashews, salami, pickled herring, sunflower seeds, sweet corn,
        laundry powder, zucchini, gouda, quinoa, ice cream, lentils, marzipan, shampoo, pomegranates, gherkins,
        oatmeal, popcorn
    """,
    "city": """
        Bordeaux, Munich, Milan, Lisbon, Gdansk, Cologne, Edinburgh, Birmingham, Valencia, Palermo, Basel, Helsinki,
        Turku, Zagreb, Ljubljana, Utrecht, Rotterdam, Florence, Salzburg, Limoges, Erfurt
    """,
    "label": """
        porridge, cycling, the microwave, curry, violin, squats, the brownies, a shower, lunch break, the barbecue,
        karate, podcast, weeding, the goulash, roll call, roasted chestnuts, crossword, skipping rope
    """,
    "place": """
        Crimson, Hidden, Gentle, Northern, Rusty, Sunny, Trattoria, White, Clever / Anchor, Bistro, Cellar, Elephant,
        Cauldron, Orchid, Magnolia, Pepper, Heron
    """,
    "task": """
        collect, repair, wrap up, sell, inspect, install, dispose of, rinse / the broken umbrella, Tim's saxophone,
        hiking boots, the curtains, our sofa bed, the hamster wheel, the toaster, summer dresses, the farewell gift,
        the roof rack, my scarf, six lampshades, the coffee machine
    """,
    "text": """
        the workshop, breakfast, the tram, my aunt, our electrician, the proposal, the shipment, the webinar, the
        kitten, the escalator, band practice, my boss / has ended, got postponed, is being repaired, looks promising,
        leaves from platform two, went really well, waits in the lobby, works from home today, is half done, needs new
        brakes, is already up
    """,
    "units": "ml gal, oz kg, cm ft, ft cm, m mi, km cm, cm km, ft km, mi in, in mi, km in, in km",
}
PARTS = {"train": TRAIN, "valid": VALID, "test": TEST}
# The ways to write a unit; the first word is the unit in a call.
SPELLED = """
    s seconds sec secs | min minutes min mins | h hours h hrs | kg kg kilos kilograms | g g grams | l litres
    liters l | ml ml millilitres | pack packs packets | bag bags sacks | box boxes | jar jars | km km kilometres
    kilometers | m metres meters m | cm cm centimetres | mi miles | ft feet ft | in inches | lb pounds lb | oz ounces
    oz | gal gallons
"""
UNITS = {entry.split()[0]: entry.split()[1:] for entry in split(SPELLED, "|")}
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
