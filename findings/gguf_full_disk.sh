#!/bin/sh
# gguf 0.19 with NumPy 2.4: a GGUF file that did not fit on the disk is cut off, and nothing says so.
#
# Guess: a writer that runs out of space raises OSError, as Python's own files do, so a conversion that ends without an error has
# written a whole file.
# Behaviour: GGUFWriter writes tensors with ndarray.tofile, which hands the last bytes of each array to the C library's buffer and
# does not look at what becomes of them when that is closed. Where the space ends in such a tail, the writer goes on, close() is
# silent, and the file lacks the end of its tensors. Large arrays are noticed ("N requested and M written"), so it is adapters and
# other files of small tensors that come out cut off.
# Seen: a limit of 12,000 bytes on the file's size, a file of 33,920 bytes that is 12,000 long, no exception; without the limit it is
# whole. GGUFReader fails on the short one.
#
# Installs pinned public packages in a temporary folder. Ends with 0 while gguf does this. Needs a system with RLIMIT_FSIZE.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gguf==0.19.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import os
import resource
import sys

import numpy as np
from gguf import GGUFReader, GGUFWriter


def write(path):
    writer = GGUFWriter(path, "llama")
    for i in range(16):
        writer.add_tensor(f"blk.{i}.attn_q.weight.lora_a", np.full((8, 64), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


write("whole.gguf")
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
error = None
try:
    write("short.gguf")
except Exception as raised:
    error = raised
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
sizes = [os.path.getsize(name) for name in ("whole.gguf", "short.gguf")]
try:
    GGUFReader("short.gguf")
    readable = True
except Exception as raised:
    readable = False
print(f"whole file: {sizes[0]:,} bytes; with a limit of 12,000: {sizes[1]:,} bytes, error: {error!r}, readable: {readable}")
sys.exit(0 if error is None and sizes[1] < sizes[0] and not readable else 1)
PYTHON
