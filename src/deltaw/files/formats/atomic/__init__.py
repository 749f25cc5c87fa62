"""Outputs that are whole or not there: what is written takes the place of what was there in one step. Knows no formats.

writing.py writes files and folders. exchange.py puts a folder in another one's place. leftovers.py has the names of temporaries,
and removes those of killed processes. outputs.py refuses outputs that would destroy an input, or what deltaw did not write.
"""

from deltaw.files.formats.atomic.leftovers import put_back
from deltaw.files.formats.atomic.outputs import SIGNED, check_apart, check_replaceable, files_written, sign
from deltaw.files.formats.atomic.writing import check_place, replacing, replacing_folder, write_text

__all__ = [
    "SIGNED",
    "check_apart",
    "check_place",
    "check_replaceable",
    "files_written",
    "put_back",
    "replacing",
    "replacing_folder",
    "sign",
    "write_text",
]
