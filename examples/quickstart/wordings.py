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
            {duration} {unit} | measure {duration} {unit} for {label} | launch {label} with {duration} {unit}
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
            so get {count} {unit} | stock up on {item}, {count} {unit}
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
            "{text}" | I'd like {to} to hear {text} | fill {to} in: {text} |
            put {to} in the picture: {text} | drop {to} a line that {text} | Please have {to} read this: {text}
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
            | Urgent mail to {to}, {text} | remind {to} immediately that {text} | Critical! {to} should know {text}
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
            {date}, table for {people}, {time} | {place} wants to know how many: {people}, on {date} at {time}
            | arrange a table at {place} for {people}, {date}, {time} | hold a table at {place} for {people}, on {date},
            {time} | grab {people} seats at {place}, {time}, {date} | take {people} chairs at {place}, {time}, {date} |
            Dinner at {place} for {people}, {date}, {time}
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
            count {amount} {from} in {to}
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
            that I need to {task}
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
            the railway plan, {from} to {to}, on {date} | grab the list of trains, {from} to {to}, {date}
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
