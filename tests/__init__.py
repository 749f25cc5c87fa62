"""Tests need no network: a name that is not in the cache is an answer at once, and not after five tries."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
