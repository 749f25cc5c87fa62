import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.config import DataConfig
from deltaw.data import held_out_split, read, splits
from deltaw.data.sources.json_text import json_array, json_lines
from deltaw.data.sources.tables import table
from deltaw.errors import DataError

GOOD = {"prompt": "p", "completion": "c"}
LINE = json.dumps(GOOD).encode()


def failure(source, config=None, **kw):
    with pytest.raises(DataError) as caught:
        read(source, config or DataConfig(), **kw)
    return str(caught.value)


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


texts = st.text(st.characters(exclude_categories=["Cs"]))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.dictionaries(texts, texts, max_size=3), max_size=6), st.booleans(), st.sampled_from([b"\n", b"\r\n"])
)
def test_json_roundtrip_in_any_script(records, ascii_only, newline):
    lines = [json.dumps(r, ensure_ascii=ascii_only).encode() for r in records]
    parsed = json_lines(newline.join(lines), "f")
    found, problems = parsed.rows, parsed.problems
    assert not problems and [r for _, r in found] == records
    assert [p for p, _ in found] == [f"f:{i}" for i in range(1, len(records) + 1)]
    parsed = json_array(b"[\n" + b",\n".join(lines) + b"\n]", "f")
    found, problems = parsed.rows, parsed.problems
    assert not problems and [r for _, r in found] == records
    assert [p for p, _ in found] == [f"f:{i}" for i in range(2, len(records) + 2)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["good", "blank", "bad", "bytes", "list"]), min_size=1, max_size=30))
def test_every_bad_line_is_named_by_its_number(kinds):
    parts = {"good": LINE, "blank": b" ", "bad": b'{"prompt": "x', "bytes": b'{"a": "\xff"}', "list": b"[1]"}
    parsed = json_lines(b"\n".join(parts[k] for k in kinds), "f")
    found, problems = parsed.rows, parsed.problems
    assert [p for p, _ in found] == [f"f:{i}" for i, k in enumerate(kinds, 1) if k == "good"]
    bad = [f"f:{i}:" for i, k in enumerate(kinds, 1) if k in ("bad", "bytes", "list")]
    assert [p.split(" ")[0] for p in problems] == bad


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=6))
def test_csv_roundtrip(pairs):
    import csv
    import io

    out = io.StringIO(newline="")
    writer = csv.writer(out, quoting=csv.QUOTE_ALL)
    writer.writerows([("prompt", "completion"), *pairs])
    parsed = table(out.getvalue().encode(), "f")
    found, problems = parsed.rows, parsed.problems
    assert not problems
    assert [(r["prompt"], r["completion"]) for _, r in found] == pairs


def test_bom_crlf_blank_lines_and_line_separators(tmp_path):
    text = '{"prompt": "a\u2028b", "completion": "c\x85"}\r\n\r\n{"prompt": "x", "completion": "y"}\r\n'
    records = read(write(tmp_path, "a.jsonl", b"\xef\xbb\xbf" + text.encode()), DataConfig())
    assert [(r.prompt, r.completion, r.place) for r in records] == [
        ("a\u2028b", "c\x85", "a.jsonl:1"),
        ("x", "y", "a.jsonl:3"),
    ]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", b"", ["no records"]),
        ("a.json", b"[]", ["no records"]),
        ("a.csv", b"prompt,completion\n", ["no records"]),
        ("a.jsonl", LINE + b'\n{"prompt": "x', ["1 of 2", "a.jsonl:2", "column 12", "cut off"]),
        ("a.jsonl", LINE + b'\n{"prompt": "x\xff"}', ["a.jsonl:2", "0xff at byte 14", "UTF-8"]),
        ("a.jsonl", "\ufeff{}".encode("utf-16-le"), ["UTF-16"]),
        ("a.jsonl", LINE + b"\n" + b"[" * 100_000, ["a.jsonl:2", "not JSON"]),
        ("a.json", b"[\n" + LINE + b",\n" + LINE[:9], ["a.json:3", "not JSON"]),
        ("a.json", b"[\n" + LINE + b"\n" + LINE + b"]", ["a.json:3", "expected ','"]),
        ("a.json", b"[\n" + LINE, ["a.json:2", "ends inside the array"]),
        ("a.csv", b'prompt,completion\na,b\n\n"x\ny",b\nc\n', ["a.csv:6", "1 cells under 2 columns"]),
        ("a.csv", b'prompt,completion\na,b\na,"b\nc\n', ["a.csv:3", "double quote"]),
        ("a.csv", b"prompt,prompt\na,b\n", ["a.csv:1", "more than once"]),
        ("a.csv", b"prompt,completion\na,b\nc,\xfe\n", ["a.csv:3", "0xfe"]),
        ("a.parquet", b"PAR1 no", ["a.parquet", "parquet"]),
        ("a.doc7", b"hello", ["'.doc7'", ".jsonl"]),
        ("a.docx", b"hello", [".docx files", "as .txt"]),
        ("a.jsonl.gz", b"\x1f\x8b", [".gz files", "unpack it first"]),
        ("a.jsonl", b"\x1f\x8b\x08", ["by its first bytes it is a .gz file", "unpack"]),
        ("a.csv", b"PK\x03\x04\x80", ["a .zip file", "Excel", "CSV (UTF-8)"]),
        ("a.json", b"PAR1\x15", ["name it a.parquet"]),
        ("a.csv", "prompt,completion\r\na,b\r\n".encode("utf-16-le"), ["--encoding utf-16-le"]),
        ("a.jsonl", LINE.decode().encode("utf-16-be"), ["--encoding utf-16-be"]),
    ],
)
def test_damaged_files_are_refused_with_the_reason(tmp_path, name, content, words):
    message = failure(write(tmp_path, name, content))
    assert all(w in message for w in words), message


def test_all_problems_are_counted_and_twenty_shown(tmp_path):
    message = failure(write(tmp_path, "a.jsonl", LINE + b"\n" + b"{\n" * 50))
    assert message.index("a.jsonl:2:") < message.index("a.jsonl:21:")
    assert "50 of 51" in message and "30 more" in message


def test_parquet_rows_are_read_by_number(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    pq.write_table(pyarrow.table({"prompt": ["a", "b"], "completion": ["c", None]}), tmp_path / "train.parquet")
    message = failure(tmp_path)
    assert "train.parquet[1]" in message and "found null" in message


@pytest.mark.parametrize("as_dataset", [False, True])
def test_a_tables_objects_have_only_the_fields_that_their_record_had(tmp_path, as_dataset):
    """All objects of a column share their fields there: another record's argument would be taught as null."""
    pq, datasets = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("datasets")
    calls = [{"name": "f", "arguments": {"city": "Rome"}}, {"name": "g", "arguments": {"unit": ["C", None]}}]
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]} for call in calls
    ]
    data = datasets.Dataset.from_list(rows)
    if not as_dataset:
        pq.write_table(data.data.table, tmp_path / "train.parquet")
    records = read(data if as_dataset else tmp_path, DataConfig())
    arguments = [record.messages[-1].tool_calls[0].arguments for record in records]
    assert arguments == ['{"city": "Rome"}', '{"unit": ["C", null]}']


def test_a_folder_has_the_splits_of_its_files(tmp_path):
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "dev.jsonl", "test.jsonl"):
        write(tmp_path, name, json.dumps(GOOD | {"prompt": name}))
    assert [r.prompt[:11] for r in read(tmp_path, DataConfig())] == ["train-00000", "train-00001"]
    assert list(splits(tmp_path)) == ["dev", "test", "train"]
    assert held_out_split(tmp_path) == "dev"
    assert read(tmp_path, DataConfig(split="test")).items[0].prompt == "test.jsonl"
    message = failure(tmp_path, split="tset")
    assert "'test'" in message and "dev, test, train" in message
    write(tmp_path, "dev.csv", "prompt,completion\na,b\n")
    assert "dev.csv" in failure(tmp_path)


def test_what_a_folder_has_beside_its_splits_is_not_passed_over_in_silence(tmp_path):
    """A packed train split left the held-out one alone, which was then trained on."""
    write(tmp_path, "Valid.jsonl", LINE)
    write(tmp_path, "._Valid.jsonl", b"\x00\x05\x16\x07")
    records = read(tmp_path, DataConfig())
    assert records.notes == (f"{tmp_path}: its only split, valid, is read",) and held_out_split(tmp_path) is None
    write(tmp_path, "test.ndjson", LINE)
    assert held_out_split(tmp_path, "valid") == "test" and held_out_split(tmp_path) == "valid"
    assert "--split" in failure(tmp_path, split="train")
    write(tmp_path, "train.jsonl.gz", b"\x1f\x8b")
    assert "train.jsonl.gz: .gz files are not read: unpack it first" in failure(tmp_path)
    write(tmp_path, "dataset_info.json", b"{}")
    assert "save_to_disk" not in failure(tmp_path)  # LLaMA-Factory has such a file too
    write(tmp_path, "state.json", b"{}")
    assert "save_to_disk" in failure(tmp_path)


def test_splits_that_are_neither_trained_on_nor_held_out_are_named(tmp_path):
    for name in ("train.jsonl", "valid.jsonl", "test.jsonl", "extra.jsonl"):
        write(tmp_path, name, LINE)
    assert read(tmp_path, DataConfig()).notes == (f"{tmp_path}: not read: extra.jsonl, test.jsonl",)
    assert read(tmp_path, DataConfig(), split="valid").notes == ()


def test_a_folder_of_folders_says_which_have_files(tmp_path):
    for name in ("train", "validation"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "a.jsonl", LINE)
    assert "Its folders train, validation have files: name one of these, or a file." in failure(tmp_path)


def test_a_folder_of_documents_says_which_files_are_no_records(tmp_path):
    for name, text in {"a.txt": b"A\n\nB", "b.md": b" \n", "c.pdf": b"%PDF", ".d.txt": b"D"}.items():
        write(tmp_path, name, text)
    records = read(tmp_path, DataConfig())
    assert [r.completion for r in records] == ["A\n\nB"]
    words = ["1 text files, each a record", "empty, so no records: b.md", "not read: c.pdf"]
    assert records.notes == tuple(f"{tmp_path}: {part}" for part in words)


def test_all_counts_as_train_and_has_no_held_out_part(tmp_path):
    write(tmp_path, "all.jsonl", LINE)
    assert len(read(tmp_path, DataConfig())) == 1 and held_out_split(tmp_path) is None


def test_missing_sources_are_refused_with_the_nearest_name(tmp_path):
    write(tmp_path, "train.jsonl", LINE)
    assert "train.jsonl" in failure(tmp_path / "trian.jsonl")
    assert "not there either" in failure(tmp_path / "no" / "x.jsonl")
    (tmp_path / "empty").mkdir()
    assert "no data files" in failure(tmp_path / "empty")
    assert "no splits" in failure(tmp_path / "train.jsonl", split="valid")
    assert "no data source" in failure(7)


def test_datasets_in_memory_are_read_like_lists():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([GOOD, GOOD])
    assert [r.place for r in read(data, DataConfig())] == ["records[0]", "records[1]"]
    both = datasets.DatasetDict(train=data, validation=data)
    assert held_out_split(both) == "validation" and len(read(both, DataConfig(), split="validation")) == 2


def test_hub_failure_is_ours(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load(name, split):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = failure("someone/data")
    assert "someone/data" in message and "ConnectionError: offline" in message


def test_a_key_that_is_twice_in_a_record_is_named(tmp_path):
    line = b'{"prompt": "a", "completion": "b", "prompt": "c"}'
    for name, content in (("x.jsonl", LINE + b"\n" + line), ("x.json", b"[" + LINE + b",\n" + line + b"]")):
        message = failure(write(tmp_path, name, content))
        assert f"{name}:2: not JSON that can be read: 'prompt' is in it twice" in message


def test_records_nested_too_deep_are_named(tmp_path):
    deep = b'{"prompt": "a", "completion": "b", "x": ' + b"[" * 500 + b"]" * 500 + b"}"
    assert "x.jsonl:1: not JSON that can be read: it is nested deeper" in failure(write(tmp_path, "x.jsonl", deep))


def test_parquet_values_that_python_cannot_hold_are_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    binary = pyarrow.array([b"good", b"\xff\xfe"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, binary.buffers())
    table = pyarrow.table({"prompt": text, "completion": pyarrow.array(["a", "b"])})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert "x.parquet[1]: a value cannot be read" in failure(tmp_path / "x.parquet")
    dates = pyarrow.array([0, 2**55], pyarrow.timestamp("ms"))
    table = pyarrow.table({"prompt": pyarrow.array(["a", "b"]), "completion": dates})
    pyarrow.parquet.write_table(table, tmp_path / "y.parquet")
    message = failure(tmp_path / "y.parquet")
    assert "y.parquet[0]: field 'completion' must be text" in message and "y.parquet[1]: a value" in message


@pytest.mark.parametrize("label", [10**400, -(10**400), "1" * 400 + ".0"], ids=["large", "small", "text"])
def test_a_label_of_400_digits_is_no_foreign_error(label):
    from deltaw.data.labels import class_names

    rows = [{"text": "a", "label": 1}, {"text": "b", "label": label}]
    with pytest.raises(DataError):
        class_names(read(rows, DataConfig()).items)


def test_an_image_field_longer_than_a_file_name_is_no_path(tmp_path):
    rows = [{"image": "x" * 5000, "label": 0}, {"image": "a\x00b", "label": 1}]
    path = write(tmp_path, "x.jsonl", "\n".join(map(json.dumps, rows)))
    assert [record.image for record in read(path, DataConfig())] == [row["image"] for row in rows]


def test_a_row_without_values_is_a_record_unless_it_ends_the_file(tmp_path):
    """Excel writes such rows after the last one. Between others it is a record whose fields are empty."""
    path = tmp_path / "d.csv"
    path.write_text("prompt,completion\na,b\n,\n,\n\n")
    assert len(read(path, DataConfig())) == 1
    path.write_text("prompt,completion\na,b\n,\nc,d\n,\n")
    with pytest.raises(DataError, match=r"d\.csv:3: field 'completion' is empty"):
        read(path, DataConfig())
