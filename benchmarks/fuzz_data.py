"""Damaged data files, and what they should come to. benchmarks/fuzz.py runs them.

The reference reads each form by `json`, `csv` or pyarrow alone. A file is read right where each record has the texts that the
reference has, and its tokens, joined, are its texts.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet

from deltaw.config import DataConfig
from deltaw.data import encode, read
from deltaw.data.items import encode_images, encode_labelled, encode_seq2seq
from deltaw.data.labels import are_quantities, class_names
from deltaw.errors import DeltaWError
from fuzz_adapters import DEEP, JUNK, Outcome, rng

FORMS: dict[str, list[dict[str, Any]]] = {
    "prompt": [{"prompt": f"What is {i}? ", "completion": f"It is {i}."} for i in range(5)],
    "chat": [
        {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"{i}!"}]} for i in range(5)
    ],
    "instruction": [{"instruction": f"Add {i}", "input": "2", "output": f"{i + 2}"} for i in range(5)],
    "text": [{"text": f"A text about {i}."} for i in range(5)],
    "labelled": [{"text": f"text {i}", "label": i % 2} for i in range(6)],
    "quantity": [{"text": f"text {i}", "label": i + 0.5} for i in range(6)],
    "pair": [{"text": f"text {i}", "text_pair": "other", "label": "ab"[i % 2]} for i in range(6)],
    "image": [{"image": [[i, 2, 3], [4, 5, 6]], "label": i % 2} for i in range(4)],
    "preference": [{"prompt": f"Say {i}", "chosen": "yes", "rejected": "no"} for i in range(4)],
    "tools": [
        {
            "messages": [
                {"role": "user", "content": "weather?"},
                {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": i}}}]},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        }
        for i in range(3)
    ],
}  # fmt: skip
VALUES: list[Any] = [
    *JUNK, "1" * 400, int("9" * 400), 1e400, "1e400", "NaN", "-inf", "\x00", "a" * 4096, "x" * 300 + ".png",
    "\u2028", "é" * 3, "\ud83d",
    "/dev/zero", "/dev/stdin", "/proc/self/mem", ".", "a\x00b", [[1, [2]]], {"bytes": "x"}, {"path": "../x"}, {"bytes": b"x"},
    datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1, 12), datetime.timedelta(1), b"\xff\xfe", [{"role": 3}],
    [{"role": "assistant", "content": None}], [{"from": "gpt", "value": ["x"]}], "<|im_end|>", "<s>", "{{ 1 }}",
]  # fmt: skip


def tokenizer() -> Any:
    """Return a byte-level tokenizer of no file, with ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    result = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>", pad_token="<s>")
    result.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    result.chat_template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    return result


def processor() -> Any:
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size={"height": 4, "width": 4})


def damage_records(records: list[dict[str, Any]], random: Random) -> tuple[list[Any], str]:
    """Change one value, field or record."""
    records = json.loads(json.dumps(records))
    record = random.choice(records)
    field = random.choice(list(record))
    kind = random.choice(("none", "value", "value", "value", "value", "drop", "add", "record", "inner"))
    if kind == "value":
        record[field] = random.choice(VALUES)
        return records, f"value of {field}"
    if kind == "drop":
        del record[field]
    elif kind == "add":
        record[random.choice(["label", "text", "messages", "tools", "image", "", "\x1b[31m", "\ud800"])] = (
            random.choice(VALUES)
        )
    elif kind == "record":
        records[random.randrange(len(records))] = random.choice(VALUES)
    elif kind == "inner" and isinstance(record.get("messages"), list):
        turn = random.choice(record["messages"])
        turn[random.choice(list(turn))] = random.choice(VALUES)
    return records, kind


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


def write(path: Path, records: list[Any]) -> bool:
    """Write records in the form of the file's ending. Return False where they have no such form."""
    if path.suffix == ".parquet":
        try:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
        except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError, TypeError, AttributeError, ValueError):
            return False
    elif path.suffix == ".csv":
        if not all(isinstance(record, dict) for record in records):
            return False
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for record in records for key in record)))
        writer.writeheader()
        writer.writerows(records)
        path.write_bytes(stream.getvalue().encode("utf-8", "surrogatepass"))
    else:
        lines = [json.dumps(plain(record)) for record in records]
        text = "\n".join(lines) if path.suffix == ".jsonl" else "[" + ",\n".join(lines) + "]"
        path.write_bytes(text.encode())
    return True


def damage_file(path: Path, random: Random) -> str:
    """Change bytes of a file, or what JSON it holds."""
    raw = path.read_bytes()
    at = random.randrange(len(raw))
    kind = random.choice(("flip", "cut", "UTF-8", "more", "twice", "deep", "empty", "large", "zero", "column"))
    if kind == "flip":
        changed = bytearray(raw)
        changed[at] ^= 1 << random.randrange(8)
        raw = bytes(changed)
    elif kind == "cut":
        raw = raw[:at]
    elif kind == "UTF-8":
        raw = raw[:at] + random.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf5\x80"]) + raw[at:]
    elif kind == "more":
        raw += random.choice([b"]", b"{", b"\n{}", b"\n[]", b"\x00", b"\nnull", b",", b"\n" * 1000])
    elif kind == "twice":
        raw = raw.replace(b"{", b'{"prompt": "first", "text": "first", ', 1)
    elif kind == "deep":
        raw = raw.replace(
            b'": ', b'": ' + random.choice([DEEP.encode(), b'{"a":' * 500 + b"1" + b"}" * 500]) + b', "b": ', 1
        )
    elif kind == "empty":
        raw = random.choice([b"", b"\n", b"\xef\xbb\xbf", b"[]", b"{}"])
    elif kind == "large":
        raw = raw.replace(b'": "', b'": "' + b"x" * 200_000, 1)
    elif kind == "zero":
        raw = raw[:at] + bytes(20) + raw[at + 20 :]
    else:
        kind = "column of bytes"
        if path.suffix == ".parquet":
            arrays = random.choice(
                (
                    {"text": invalid_text(), "label": pyarrow.array([0, 1])},
                    {"text": pyarrow.array(["a", "b"]), "label": pyarrow.array([datetime.date(2020, 1, 1), None])},
                    {
                        "text": pyarrow.array(["a", "b"]),
                        "label": pyarrow.array([10**15, -(10**15)], pyarrow.timestamp("ms")),
                    },
                    {"text": pyarrow.array([b"a", b"b"]), "label": pyarrow.array([0, 1])},
                    {
                        "text": pyarrow.array(["a", "b"]),
                        "label": pyarrow.array([2**62, -(2**62)], pyarrow.duration("s")),
                    },
                )
            )
            pyarrow.parquet.write_table(pyarrow.table(arrays), path)
            return f"file: {kind}"
    path.write_bytes(raw)
    return f"file: {kind}"


def invalid_text() -> Any:
    """Return a column of text whose bytes are no UTF-8."""
    binary = pyarrow.array([b"\xff\xfe", b"ab"], pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), 2, binary.buffers())


def reference(path: Path) -> list[Any]:
    """Return the file's records by the libraries alone."""
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(raw.decode(), newline="\n")))
    if raw.lstrip()[:1] == b"[" and path.suffix == ".json":
        return json.loads(raw)
    return [json.loads(line) for line in raw.decode().split("\n") if line.strip()]


def twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is twice in it")
    return dict(pairs)


class Campaign:
    """The cases of one worker."""

    def __init__(self) -> None:
        self.tokenizer, self.processor = tokenizer(), processor()

    def __call__(self, seed: int, number: int, folder: Path) -> Outcome:
        """Run one case in an empty folder."""
        random = rng(seed, number)
        form = random.choice(list(FORMS))
        path = folder / f"train{random.choice(('.jsonl', '.jsonl', '.json', '.csv', '.parquet'))}"
        records, mutation = damage_records(FORMS[form], random)
        if not write(path, records):
            path, mutation = path.with_suffix(".jsonl"), "none"
            write(path, FORMS[form])
        if random.random() < 0.4:
            mutation = damage_file(path, random)
        label, nested = f"{mutation}: {form}, {path.suffix}", form in ("chat", "image")
        try:
            texts = self._encoded(path, form, random)
        except DeltaWError:
            if mutation == "none" and form not in ("preference", "tools") and not (nested and path.suffix == ".csv"):
                return Outcome("silent", label, "a sound file was refused")
            return Outcome("refused", label)
        except Exception as error:
            error.add_note(label)
            raise
        why = self._wrong(texts, path)
        return Outcome("silent" if why else "right", label, why or "")

    def _encoded(self, path: Path, form: str, random: Random) -> list[str]:
        """Read and encode a file. Return each record's texts together."""
        task = "auto" if form in ("labelled", "quantity", "pair", "image") else "causal"
        records = read(path, DataConfig(task=task))
        if records.form not in ("labelled", "image"):
            if records.form in ("prompt", "instruction") and random.random() < 0.3:
                encode_seq2seq(records, self.tokenizer, DataConfig(max_length=100_000))
            encoded = encode(records, self.tokenizer, DataConfig(max_length=1_000_000))
            return [self.tokenizer.decode(example.input_ids) for example in encoded.examples]
        numbers = are_quantities(records.items, records.source)
        labels = None if numbers else class_names(records.items, records.source)
        config = DataConfig(task="regression" if numbers else "classification", labels=labels, max_length=1_000_000)
        if records.form == "image":
            return [""] * len(encode_images(records, self.processor, config).examples)
        encoded = encode_labelled(records, self.tokenizer, config)
        return [self.tokenizer.decode(item.inputs["input_ids"]) for item in encoded.examples]

    def _wrong(self, texts: list[str], path: Path) -> str | None:
        """Say where the tokens are not those of the reference's texts."""
        try:
            records = reference(path)
            if path.suffix in (".json", ".jsonl"):
                raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode()
                for line in [raw] if isinstance(records, list) and raw.lstrip()[:1] == "[" else raw.split("\n"):
                    if line.strip():
                        json.loads(line, object_pairs_hook=twice)
        except Exception as error:
            return f"accepted, and the reference refuses it: {error!r:.100}"
        records = [one for record in records for one in of_each_answer(record)]
        if len(records) != len(texts):
            return f"{len(texts)} of {len(records)} records"
        for record, text in zip(records, texts, strict=True):
            turns = record.get("messages")
            if isinstance(turns, list) and "assistant" in text:
                parts = [turn["content"] for turn in turns if turn.get("role") == "assistant"][-1:]
            else:
                names = ("prompt", "completion", "instruction", "output", "text", "text_pair")
                parts = [record[name] for name in names if isinstance(record.get(name), str)]
                if {"prompt", "completion"} <= record.keys() or {"instruction", "output"} <= record.keys():
                    parts = [record.get("completion", record.get("output"))]
            if text and not all(str(part).rstrip() in text for part in parts):
                return f"{text[:80]!r} for {parts!r:.100}"
        return None


def of_each_answer(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a record for each of several answers."""
    name = next((n for n in ("completion", "output") if isinstance(record.get(n), list)), None)
    if name is None or not all(isinstance(text, str) for text in record[name]):
        return [record]
    return [{**record, name: text} for text in record[name]]


def campaign(scratch: Path) -> Callable[[int, int, Path], Outcome]:
    """Return what runs a case."""
    return Campaign()
