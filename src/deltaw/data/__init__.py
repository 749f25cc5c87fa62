"""Records → tokens and masks → batches. Knows no model beyond its tokenizer.

sources/     files, folders, hub data sets, lists → rows with their places
fields/      a row's fields → the names that forms know: columns, other names, fields with a meaning that is not used
forms.py     fields → records: prompt/completion, chat, instruction, text, labelled, image
prompts.py   items: records with the same prompt
hold_out.py  records set aside by whole items
records.py   sources and forms together: read, and references for scoring
chats/       conversations: messages, their template, exactly the assistant's tokens
encode.py    records → examples; prompts to generate from
labels.py    classes and quantities
items.py     records of tasks other than the next token → a model's inputs and targets; their batches
images.py    pictures → pixels
batches.py   examples → length-bucketed batches, as tensors
"""

from deltaw.data.batches import Batch, Order, collate, plan
from deltaw.data.chats.encode import encode_chat, prompt_ids, turn_ends
from deltaw.data.chats.messages import Message
from deltaw.data.encode import (
    Counts,
    Encoded,
    Example,
    as_said,
    as_taught,
    check_unwrapped,
    encode,
    encode_prompt,
    encode_prompts,
    prompt_ends,
    template_of,
    usual_separator,
)
from deltaw.data.forms import Record
from deltaw.data.records import Records, read, references
from deltaw.data.sources import held_out_split, splits

__all__ = [
    "Batch",
    "Counts",
    "Encoded",
    "Example",
    "Message",
    "Order",
    "Record",
    "Records",
    "as_said",
    "as_taught",
    "check_unwrapped",
    "collate",
    "encode",
    "encode_chat",
    "encode_prompt",
    "encode_prompts",
    "held_out_split",
    "plan",
    "prompt_ends",
    "prompt_ids",
    "read",
    "references",
    "splits",
    "template_of",
    "turn_ends",
    "usual_separator",
]
