"""The wordings of the quickstart's calls; those of the three parts are disjoint."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Call:
    """One thing to ask for: the tool, the slots its wordings fill in, and arguments the wording itself settles.

    A slot is "argument:kind", or one word that is both. A wording that begins with a small letter is an imperative,
    which may get an opening; any other stands alone.
    """

    tool: str
    slots: str
    train: str
    valid: str
    test: str
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
            {duration} {unit} | measure {duration} {unit} for {label} | launch {label} with {duration} {unit} | run a
            clock on {label} for {duration} {unit} | have the timer at {duration} {unit} for {label} | fix {duration}
            {unit} as the limit for {label} | take {duration} {unit} from now and ring for {label} | get the countdown
            going, {duration} {unit}, {label} | do a countdown of {duration} {unit} for {label} | note the start of
            {label} and ring once {duration} {unit} have passed | check back with me in {duration} {unit} about {label}
            | call out when {label} reaches {duration} {unit} | plan {duration} {unit} for {label}, starting now, and
            ring at the end | limit {label} to {duration} {unit} | allow {label} {duration} {unit} and then make a
            sound | cut {label} off after {duration} {unit} | add a timer called {label} lasting {duration} {unit} |
            order me to end {label} in {duration} {unit} | send a signal when {duration} {unit} of {label} have gone by
            | find a free timer for {label} and wind it to {duration} {unit} | remind me about {label} in {duration}
            {unit} | ping me about {label} {duration} {unit} from now | turn the egg timer to {duration} {unit},
            {label} | write {label} on a timer and let it run {duration} {unit} | show me a countdown from {duration}
            {unit}, title {label} | reserve {duration} {unit} for {label} and chime when they're gone | Only {duration}
            {unit} for {label}, then ring | {label} should be over in {duration} {unit}, ring then | {duration} {unit}
            from now, shout "{label}" | Could I get {duration} {unit} timed for {label} | May I have a countdown for
            {label} of {duration} {unit} | {label} first, and in {duration} {unit} I want to hear a bell | Give a shout
            in {duration} {unit}, {label} is what it's for | Is a timer running for {label}? If not, start one at
            {duration} {unit} | Would you time {label}? It should last {duration} {unit} | Clock starts now: {label},
            {duration} {unit} | I've just started {label}, so ring in {duration} {unit} | My limit for {label} is
            {duration} {unit}, hold me to it | Countdown "{label}": {duration} {unit} | {duration} {unit} is all I have
            for {label}, so sound the bell then | We said {duration} {unit} for {label}, let it tick | {label},
            {duration} {unit}, clock running | When {duration} {unit} of {label} are behind me, I'd like a chime
        """,
        valid="""
            launch a clock of {duration} {unit} named {label} | hit the stopwatch for {label}, {duration} {unit} |
            chime once {duration} {unit} of {label} are up | Timing please: {label}, {duration} {unit} | Give a signal
            {duration} {unit} from now, {label} is finished then
        """,
        test="""
            begin a {duration} {unit} countdown for {label} | run a timer on {label}, {duration} {unit} | ring a bell
            when {duration} {unit} of {label} have passed | Timer wanted: {duration} {unit}, the name is {label} |
            {label} should last {duration} {unit}, tell me when time is up
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
            so get {count} {unit} | stock up on {item}, {count} {unit} | make sure {item} is on the shopping list,
            {count} {unit} | fix the shopping list so it says {count} {unit} of {item} | take down {count} {unit} of
            {item} for the shop | run {item} through to the grocery list, {count} {unit} | have {count} {unit} of
            {item} on the list for my next shop | do the shopping list: {count} {unit} of {item} go on it | check that
            the list has {item}, and if not put {count} {unit} | call for {count} {unit} of {item} on the shopping list
            | plan for {count} {unit} of {item} on my next shopping trip | book {item} onto the grocery list, {count}
            {unit} | set {item} down for shopping, {count} {unit} | tell the shopping list it needs {count} {unit} of
            {item} | write {count} {unit} of {item} under things to buy | keep {item} in mind for the supermarket,
            {count} {unit} | find room for {item} on the shopping list, {count} {unit} | turn the last line of the
            shopping list into {count} {unit} of {item} | count {item} among the groceries, {count} {unit} | start the
            shopping list with {item}, {count} {unit} | mark {count} {unit} of {item} as to be bought | drop {count}
            {unit} of {item} into the shopping basket | include {item} in the weekly shop, {count} {unit} | throw
            {item} on the list too, {count} {unit} of it | restock {item} with {count} {unit} | fetch {count} {unit} of
            {item} from the store | We've run out of {item} again, {count} {unit} should do | {item} is missing at
            home, put {count} {unit} on the list | {count} {unit} of {item} for the grocery list | {count} {unit} would
            be enough of {item}, write it on the list | Could we get some more {item}, say {count} {unit} | Whoever
            goes shopping should get {count} {unit} of {item} | Next time at the store: {item}, {count} {unit} | To
            buy: {item} - {count} {unit} | Groceries, {item}, {count} {unit} | I used up all the {item}, so {count}
            {unit} more for the list | My recipe calls for {item}, so list {count} {unit} for the shop | If the store
            has {item}, I want {count} {unit} | Would you jot down {item} for the market, {count} {unit} | The fridge
            is empty, so list {count} {unit} of {item} | Let's have {count} {unit} of {item} this week, add it | {item}
            should go on the list, I think {count} {unit}
        """,
        valid="""
            stick {count} {unit} of {item} on the list | have {item} on the next shopping trip, {count} {unit} |
            Groceries should include {count} {unit} of {item} | save {count} {unit} of {item} under shopping | My
            basket still lacks {item}: {count} {unit}
        """,
        test="""
            include {count} {unit} of {item} in my shopping | jot down {item} for the grocery run, {count} {unit} | Our
            fridge is missing {item}, {count} {unit} would do | throw {count} {unit} of {item} in the cart | I must not
            leave the shop without {item}: {count} {unit}
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
            "{text}" | I'd like {to} to hear {text} | fill {to} in: {text} | put {to} in the picture: {text} | drop
            {to} a line that {text} | Please have {to} read this: {text} | fix up a message to {to}: {text} | take a
            message for {to}: {text} | get a message over to {to} that {text} | put it to {to} that {text} | make a
            message for {to} with the words "{text}" | do {to} the favour of saying that {text} | note down for {to}
            that {text} | have {to} informed that {text} | run it by {to} that {text} | check in with {to}: {text} |
            call {to} and pass on that {text} | find {to} in my contacts and write: {text} | add {to} as the recipient
            and write: {text} | start a chat with {to}: {text} | set up a text to {to}: {text} | turn to {to} and say
            that {text} | show {to} these words: "{text}" | keep {to} posted: {text} | speak to {to} and tell them that
            {text} | reach out to {to}: {text} | point out to {to} that {text} | break it to {to} that {text} |
            reassure {to} that {text} | slip {to} a line: {text} | transmit "{text}" to {to} | compose "{text}" for
            {to} | put "{text}" in a message for {to} | pass "{text}" along to {to} | Has {to} heard? Write that {text}
            | Does {to} know that {text}, if not then write it | {to} doesn't know yet that {text}, so write it | {to}
            asked me, answer that {text} | {to}: let them know that {text} | To {to}: {text} | Text message, content
            "{text}", recipient {to} | Could someone tell {to} that {text} | I think {to} would like to hear that
            {text} | I forgot to tell {to} that {text}, do it for me | Whenever you get round to it, let {to} know that
            {text} | Would you drop {to} a message: {text}
        """,
        valid="""
            pass the word to {to} that {text} | fire off a text to {to}: {text} | communicate to {to} that {text} |
            Kindly let {to} in on this: {text} | beam "{text}" over to {to}
        """,
        test="""
            shoot {to} a text that {text} | get in touch with {to} and say {text} | pass this on to {to}: {text} |
            Someone should tell {to} that {text} | address a note to {to}: "{text}"
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
            | Urgent mail to {to}, {text} | remind {to} immediately that {text} | Critical! {to} should know {text} |
            put out an urgent call to {to}: {text} | get hold of {to} immediately and say that {text} | make haste,
            it's urgent, and tell {to} that {text} | call {to} this instant and say that {text} | run to {to} with
            this, it's urgent: {text} | drop everything and write {to} that {text} | do this first, it is urgent: tell
            {to} that {text} | take this down for {to}, most urgent: {text} | have {to} told without a moment's delay
            that {text} | check nothing else first, just tell {to} straight away that {text} | push this to {to} with
            the highest priority: {text} | set the priority to urgent and mail {to}: {text} | speed a message to {to},
            it's pressing and urgent: {text} | send {to} an emergency message that {text} | rush "{text}" to {to} |
            shoot "{text}" over to {to} as quickly as you can, it's urgent | Note for {to}, extremely urgent: {text} |
            There's no time to lose, let {to} know that {text} | There is not a minute to spare, inform {to} that
            {text} | {to} needs this urgently: {text} | {to} must be told immediately that {text} | {to}, and fast,
            it's an emergency: {text} | Urgent text, "{text}", for {to} | How fast can you reach {to}? It is urgent,
            say that {text} | Can {to} be alerted at once that {text} | I need {to} to know this very minute that
            {text} | Red alert, tell {to} that {text} | Before anything else, it's critical, let {to} know that {text}
            | Alarm! Write {to} straight away that {text} | It is vital that {to} hears this right away: {text}
        """,
        valid="""
            text {to} with top urgency: {text} | Urgent news for {to}, {text} | straight away, let {to} learn that
            {text} | This is urgent: {to} ought to hear that {text}
        """,
        test="""
            without delay, text {to}: {text} | It is an urgent matter, message {to}: {text} | {to} needs this
            immediately: {text} | send {to} a message of the highest urgency: {text}
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
            {date}, table for {people}, {time} | {place} wants to know how many: {people}, on {date} at {time} |
            arrange a table at {place} for {people}, {date}, {time} | hold a table at {place} for {people}, on {date},
            {time} | grab {people} seats at {place}, {time}, {date} | take {people} chairs at {place}, {time}, {date} |
            Dinner at {place} for {people}, {date}, {time} | fix a dinner for {people} at {place}, {date}, {time} |
            take a table for {people} at {place} on {date} at {time} | get {place} to hold {people} seats on {date} at
            {time} | put {people} guests in the book at {place} for {date}, {time} | make it a table for {people} at
            {place}, {time} on {date} | do a reservation for {date} at {time}: {place}, {people} people | note us down
            at {place} as a party of {people}, {date} at {time} | have {place} set a table for {people} on {date} at
            {time} | run a booking through at {place}: {people} guests, {date}, {time} | check whether {place} has a
            table for {people} on {date} at {time} and take it | call up {place}, we'd like a table on {date} at {time}
            for {people} | plan a meal out on {date} at {time}, {place}, {people} guests | write to {place} for a table
            on {date} at {time}, {people} guests | send {place} a table request for {people} people, {date}, {time} |
            add a booking at {place} on {date}, {time}, party of {people} | let {place} know that we need a table for
            {people} on {date} at {time} | set a table aside for us at {place}, {people} people, {date} at {time} |
            find out if {place} takes {people} guests on {date} at {time} and reserve | line up a table at {place} for
            {date}, {time}, {people} seats | count us in at {place}: {people} diners on {date} at {time} | save a table
            for {people} at {place} on {date}, from {time} on | squeeze {people} of us in at {place} on {date} at
            {time} | see to it that {place} expects {people} of us for dinner at {time} on {date} | Does {place} have
            room for {people} at {time} on {date}, if so reserve | Any chance of a table at {place} on {date} at
            {time}, we'd be {people} | Would you reserve for {people} at {place}, on {date}, at {time} | {date},
            {time}: table for {people} at {place} | {people} for supper at {place}, {date}, {time} | {people} hungry
            people, {place}, {date} at {time}, sort out a table | {time} on {date} at {place}, table for {people} |
            {place}, party of {people}, {date} at {time} | {place} on {date} sounds good, reserve at {time} for
            {people} | Let's eat out at {place} on {date} at {time}, {people} in total, reserve it | Supper
            reservation, {people} guests, {time}, {date}, {place} | Our anniversary dinner: {place}, {date}, {time},
            table for {people} | The team goes to {place} on {date} at {time}, a table for {people} is needed | For
            {people} people I need a table on {date} at {time}, restaurant {place} | At {place} we want to sit down at
            {time} on {date}, {people} of us | If there's a table for {people} at {place} on {date} at {time}, book it
        """,
        valid="""
            fix a table at {place} for {people}, on {date}, {time} | organise a meal at {place} for {people} persons at
            {time} on {date} | A group of {people} will dine at {place}, {date}, {time} | claim {people} seats at
            {place}, {time}, {date} | Supper at {place} for {people}, the day is {date}, the hour {time}
        """,
        test="""
            get a reservation for {people} at {place}, {date}, {time} | see that we have a table at {place} on {date}
            at {time}, {people} people | Our party of {people} would love a table at {place}, {time} on {date} | We are
            hungry for {place}: {people} people, {date}, {time} | block a table for {people} at {place} on {date},
            {time}
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
            count {amount} {from} in {to} | make {amount} {from} into {to} | do the conversion of {amount} {from} into
            {to} | take {amount} {from} and give it to me in {to} | check how many {to} go into {amount} {from} | run
            {amount} {from} through the converter to {to} | note down {amount} {from}, but in {to} | have {amount}
            {from} converted to {to} | fix this for me: {amount} {from} should be in {to} | call out the {to} value of
            {amount} {from} | let me know what {amount} {from} comes to in {to} | give me the {to} for {amount} {from}
            | send me the {to} figure for {amount} {from} | set out {amount} {from} in terms of {to} | remind me what
            {amount} {from} makes in {to} | state {amount} {from} in {to} | calculate the {to} in {amount} {from} |
            swap {amount} {from} for {to} | restate {amount} {from} using {to} | rewrite {amount} {from} with {to} as
            the unit | report {amount} {from} in {to} | start from {amount} {from} and end up with {to} | go from
            {amount} {from} to {to} | transform {amount} {from} into a number of {to} | {to}, that's what I want for
            {amount} {from} | {to} for {amount} {from} | {to} instead of {amount} {from} | {amount} {from} makes how
            many {to} | {amount} {from} - what would that be in {to} | {amount} {from} means nothing to me, give me
            {to} | {amount} {from}, but in {to} | What would {amount} {from} be, measured in {to} | Do you know
            {amount} {from} in {to} | Could I have {amount} {from} in {to} | The label reads {amount} {from}, and I
            think in {to} | Unit conversion, {amount} {from}, target {to} | I only understand {to}, so what's {amount}
            {from} | If I've got {amount} {from}, how many {to} do I have | Someone told me {amount} {from}, which is
            what in {to}
        """,
        valid="""
            figure out {amount} {from} in {to} | How would you say {amount} {from} in {to} | If it measures {amount}
            {from}, how many {to} is it | display {amount} {from} using {to} | bring {amount} {from} over to {to}
        """,
        test="""
            work out {amount} {from} in {to} | What would {amount} {from} be in {to} | give me the value of {amount}
            {from} in {to} | My device reads {amount} {from}, which is how many {to} | switch {amount} {from} over to
            {to}
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
            that I need to {task} | fix a reminder for {date}, {time}, to {task} | take note that I must {task} on
            {date} at {time} | get me to {task} on {date} at {time} | put "{task}" on my agenda for {date} at {time} |
            make me {task} on {date} at {time} | do what it takes to make me {task} on {date} at {time} | note that on
            {date} at {time} I have to {task} | have me {task} on {date} at {time} | run a reminder on {date} at
            {time}: {task} | check on {date} at {time} that I {task} | call me up on {date} at {time} so I {task} |
            plan for me to {task} on {date} at {time} | write into my diary for {date}, {time}: {task} | send me a
            nudge on {date} at {time} to {task} | text me at {time} on {date} that I should {task} | find me at {time}
            on {date} and make me {task} | keep me from forgetting to {task}, {date}, {time} | show me a note on {date}
            at {time} saying to {task} | start bugging me at {time} on {date} to {task} | set aside {time} on {date}
            for me to {task} | save this for {date} at {time}: {task} | enter a to-do, {task}, due {date} at {time} |
            jog my memory at {time} on {date} to {task} | prompt me to {task} when it is {time} on {date} | pop up on
            {date} at {time} with "{task}" | give me a sign at {time} on {date}, I want to {task} | hold me to it:
            {task}, {date}, {time} | see that I {task} on {date}, {time} sharp | {time} on {date}, {task}, keep me
            honest | {task}: due on {date} at {time} | {task}, that's my job for {date} at {time} | {date} at {time} is
            when I have to {task}, buzz me | {date} is the day I {task}, nudge me at {time} | Could I be reminded on
            {date} at {time} to {task} | Would you poke me at {time} on {date}, I've got to {task} | My to-do for
            {date}, {time}: {task} | Appointment with myself, {date}, {time}: {task} | If I forget to {task} on {date}
            at {time} I'm in trouble, so prompt me | I keep forgetting to {task}, nudge me on {date} at {time} |
            Someone has to {task} on {date} at {time} and it's me, prod me
        """,
        valid="""
            see to it that I remember to {task}, {date}, {time} | drop me a reminder to {task} at {time} on {date} | I
            am supposed to {task} on {date} at {time}, jog my memory | prompt me on {date} at {time}: {task} | Let a
            reminder go off on {date}, {time}, for me to {task}
        """,
        test="""
            nudge me to {task} on {date} at {time} | make sure I don't forget to {task}, {date}, {time} | I have
            planned to {task} at {time} on {date}, send me an alert | Have a reminder ready on {date} at {time}, I want
            to {task} | keep me from forgetting to {task} on {date} at {time}
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
            the railway plan, {from} to {to}, on {date} | grab the list of trains, {from} to {to}, {date} | fix me up
            with a train from {from} to {to}, {date} | take a look at trains on {date}, {from} to {to} | get a rail
            connection for {date}, {from} to {to} | put together a train journey from {from} to {to} on {date} | make a
            list of trains to {to} from {from} on {date} | do a train search: {from} to {to}, {date} | note the trains
            leaving {from} for {to} on {date} | have a look for trains from {from} to {to} on {date} | run a timetable
            search for {date}, {from} to {to} | check which trains go to {to} from {from} on {date} | call up the
            trains that go from {from} to {to} on {date} | plan my train ride to {to} on {date}, I start in {from} |
            write out the trains for {date}, {from} to {to} | send me the train connections from {from} to {to} for
            {date} | let me know about trains out of {from} towards {to} on {date} | set me up with a train to {to},
            {date}, from {from} | remind me which trains run from {from} to {to} on {date} | give me the rail timetable
            of {date} from {from} to {to} | see if a train goes from {from} to {to} on {date} | hunt down a train for
            {date}, starting at {from}, ending at {to} | route me by rail from {from} to {to} on {date} | figure out
            the train from {from} to {to} on {date} | bring me to {to} by rail on {date}, I'm in {from} | track down
            trains to {to}, {date}, departing {from} | Which train goes to {to} from {from} on {date} | Are there rail
            connections from {from} to {to} on {date} | Can I go by rail from {from} to {to} on {date} | What trains
            could I catch in {from} on {date} to reach {to} | Does anything run on rails from {from} to {to} on {date}
            | {from} - {to} by train, {date} | {from}, {date}, train to {to} | {to} is where I'm headed on {date}, by
            train out of {from} | {to} from {from} on {date}, which train | {date}, by train from {from} to {to} |
            {date} train search, {from} to {to} | My aunt lives in {to}, so on {date} I take the train from {from} |
            Rail journey, out of {from}, into {to}, {date} | I'm stuck in {from} and want to be in {to} on {date}, by
            train | We're taking the train to {to} on {date}, boarding in {from} | To {to} by train, from {from},
            {date}
        """,
        valid="""
            browse trains between {from} and {to}, {date} | What rail services run from {from} to {to} on {date} | I
            set off from {from} on {date}, my goal is {to}, search a train | fetch the rail schedule, {from} to {to},
            on {date}
        """,
        test="""
            look for trains going from {from} to {to} on {date} | Which trains go from {from} to {to} on {date} | My
            journey on {date} starts in {from} and ends in {to}, show the trains | see what trains there are for
            {date}, {from} to {to}
        """,
    ),
]
