"""Conversations: fields → messages → what the chat template makes of them → tokens, of which the assistant's are taught.

messages.py  a message, a tool call, a conversation
fields.py    texts in fields, and what is wrong with them
tools.py     schemas of tools and calls of them, as fields have them
turns.py     one turn as fields have it
reading.py   the fields of a record → a conversation
template.py  what the tokenizer's chat template makes of one
checks.py    what it leaves out
endings.py   the tokens that end the assistant's turns
encode.py    conversations → tokens and exactly the assistant's
"""
