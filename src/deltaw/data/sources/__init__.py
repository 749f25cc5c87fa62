"""Raw rows of files, folders of splits, hub data sets and lists. Knows no form of record and no tokenizer.

places.py    a path, hub id, list or data set → the rows of one split
files.py     one file → rows, by its ending
json_text.py JSON Lines and JSON arrays
tables.py    CSV and parquet
texts.py     plain text and Markdown
row.py       what all of them return
"""

from deltaw.data.sources.files import Reading
from deltaw.data.sources.places import HELD_OUT, Source, held_out_split, is_path, local, rows, splits
from deltaw.data.sources.row import Fields, Read, Row, show

__all__ = [
    "HELD_OUT",
    "Fields",
    "Read",
    "Reading",
    "Row",
    "Source",
    "held_out_split",
    "is_path",
    "local",
    "rows",
    "show",
    "splits",
]
