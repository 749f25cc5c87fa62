#!/bin/sh
# safetensors 0.8: equal tensors with equal metadata are unequal files, in one process and from one process to the next.
#
# Guess: the format sorts its tensors by itself, so equal content gives equal bytes, and a file's sha256 tells whether an adapter or a
# checkpoint has changed (caches, registries and deduplicating stores go by it).
# Behaviour: tensors are sorted, but the metadata's keys are written in the order of a randomly seeded hash map, another one for each
# file. With the four keys below several orders come up within twenty saves.
# Seen: 20 saves of one content, more than one sha256 among them; loaded again, all are equal.
#
# Installs pinned public packages in a temporary folder. Ends with 0 while safetensors does this.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import hashlib
import sys

import numpy as np
from safetensors.numpy import load, save

tensors = {"b": np.arange(3, dtype=np.float32), "a": np.ones(2, np.float32)}
metadata = {"format": "np", "base": "x", "step": "3", "license": "mit"}
files = [save(tensors, metadata=metadata) for _ in range(20)]
hashes = {hashlib.sha256(file).hexdigest() for file in files}
equal = all(np.array_equal(load(file)[name], tensors[name]) for file in files for name in tensors)
print(f"{len(files)} saves of one content: {len(hashes)} different files; all load alike: {equal}")
sys.exit(0 if len(hashes) > 1 and equal else 1)
PYTHON
