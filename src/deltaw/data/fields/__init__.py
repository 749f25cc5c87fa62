"""A row's fields → the names that forms of records know. Knows no file and no tokenizer, and makes no record.

columns.py   the columns that the user names
names.py     fields under the names that forms know; which fields make which form
meaning.py   fields that carry meaning and are not used; conversations and several answers in fields
taken.py     all rows of a source, with the problems and the fields that were left out
"""
