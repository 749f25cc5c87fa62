"""Every error deltaw raises on purpose. Knows nothing of torch, models or files.

    DeltaWError                 exit 1   root: catch this to catch all of ours
    ├── ConfigError             exit 2   a flag, YAML key or argument is unknown or out of range
    │   └── FolderInUse         exit 2   another process is at work in the folder
    ├── TargetError             exit 3   targets match nothing, or a layer that cannot take the update
    ├── AdapterError            exit 4   a name is taken or unknown, or the call does not fit the adapter's state
    │   └── MergeError          exit 4   a merge that could not be exact, or would change nothing
    ├── FileError               exit 5   an adapter or model file is missing, damaged, or of another base
    │   └── BaseMismatch        exit 5   the adapter was trained on other base weights
    ├── DataError               exit 6   a record, data file or chat template cannot be used
    └── TrainError              exit 7   training cannot start or go on (loss not finite, nothing supervised)
        ├── NotFinite           exit 7   a loss or gradient is NaN or infinite
        └── Interrupted         exit 130 Ctrl-C (143: SIGTERM): the work so far was saved

A message lists *all* problems, one per line, each with its place and what to do about it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence


class DeltaWError(Exception):
    """Root of the tree: catch it to catch all errors of deltaw.

    Args:
        message: What is wrong, or the heading of `problems`.
        problems: One line each, shown as a list under the message.
        advice: Lines after the list.

    Example:
        >>> import deltaw
        >>> try:
        ...     deltaw.TrainConfig(lr=-1, batch=0)
        ... except deltaw.DeltaWError as error:
        ...     print(error.problems, error.exit_code)
        ['lr is -1; it must be above 0', 'batch is 0; it must be at least 1'] 2
    """

    exit_code = 1
    """The exit code of the command line."""
    problems: list[str]
    """Each thing that is wrong; the message where it has no list."""
    is_told = False
    """True where another process of the same run tells it."""

    def __init__(self, message: str = "", problems: Sequence[str] = (), advice: str = "") -> None:
        text = listing(message, problems) if problems else message
        super().__init__(f"{text}\n{advice}" if advice else text)
        self.problems = list(problems) or [text]


class ConfigError(DeltaWError):
    exit_code = 2


class FolderInUse(ConfigError):
    """Another process is at work in the folder."""


class TargetError(DeltaWError):
    exit_code = 3


class AdapterError(DeltaWError):
    exit_code = 4


class MergeError(AdapterError):
    pass


class FileError(DeltaWError):
    exit_code = 5


class BaseMismatch(FileError):
    pass


class DataError(DeltaWError):
    exit_code = 6


class TrainError(DeltaWError):
    exit_code = 7


class NotFinite(TrainError):
    """A loss or gradient is not finite.

    Args:
        message: The values and their step.
        problems: Layers, and the records of the step.
        advice: What to try.
        step: Steps that were taken before.
    """

    def __init__(self, message: str = "", problems: Sequence[str] = (), advice: str = "", *, step: int = 0) -> None:
        super().__init__(message, problems, advice)
        self.step = step


class Interrupted(TrainError):
    """A signal ended the work.

    Args:
        message: What was saved, and how to go on.
        exit_code: 128 and the signal's number: 130 after Ctrl-C, 143 after SIGTERM.
    """

    exit_code = 130

    def __init__(self, message: str = "", *, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


_CLOSE = 0.8
"""Words that are so alike differ by a slip."""


def nearest(word: str, known: Iterable[str], *, count: int = 3, cutoff: float = 0.5) -> str:
    """Return ` (did you mean 'a' or 'b'?)` with the closest of `known`, or an empty string.

    Capitals do not count. One that is the same stands alone, and so does one that `word` begins with, unless another is closer.

    cutoff: from 0 (any) to 1 (the same), how alike they must be.
    """
    plain = {one.lower(): one for one in known}
    names = difflib.get_close_matches(word.lower(), plain, n=count, cutoff=cutoff)
    begun = [one for one in plain if word.lower().startswith(one) and len(one) > 2]
    if word.lower() in plain:
        names = [word.lower()]
    elif begun and not difflib.get_close_matches(word.lower(), names, cutoff=_CLOSE):
        names = [max(begun, key=len)]
    close = [plain[name] for name in names]
    return f" (did you mean {' or '.join(repr(c) for c in close)}?)" if close else ""


def listing(head: str, problems: Sequence[str], *, most: int = 20) -> str:
    """Return one message for many problems: `head`, then a bullet for each, with the rest counted."""
    lines = [f"  - {p}" for p in problems[:most]]
    if len(problems) > most:
        lines.append(f"  … and {len(problems) - most} more")
    return "\n".join([head, *lines])


# Controls, of which a terminal obeys most; embeddings, overrides and isolates, which reorder what stands beside them; halves of
# a pair, which no encoding has. Tabs and newlines stay, and marks of direction and joiners, which ordinary texts need
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, *, coloured: bool = False) -> str:
    r"""Return a text with its control characters spelled out, so that a terminal or a page shows them and obeys none.

    With `coloured`, sequences that only set a colour or a weight stay.

    >>> print(visible("a\x1b[2J b"))
    a\x1b[2J b
    """
    if coloured:
        pieces = _COLOUR.split(text)
        return "".join(piece if i % 2 else visible(piece) for i, piece in enumerate(pieces))
    return _CONTROL.sub(_spelled, text.replace("\r\n", "\n"))


_COLOUR = re.compile("(\x1b\\[[0-9;]*m)")


def _spelled(control: re.Match[str]) -> str:
    code = ord(control.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that is not empty, at most 300 characters; else the name of its class."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line[:300]


def needs_its_code(source: object, error: BaseException) -> FileError | None:
    """Return the refusal of a model that needs Python code of its own, where transformers' error says so; else None."""
    if "trust_remote_code=True" not in str(error):
        return None
    return FileError(
        f"{source} needs Python code that stands in its folder or hub repository, and no such code runs unasked. If you have "
        "read that code and trust its author, run it: --trust-remote-code on the command line, trust_remote_code=True in Python. "
        "It can do whatever you can do on this machine."
    )


def shown(names: Sequence[str], most: int = 3) -> str:
    """Return the first of several names as a text, and how many there are besides.

    >>> shown(["q_proj", "k_proj", "v_proj"], most=2)
    'q_proj, k_proj and 1 more'
    """
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
