"""Records as people have them: each file trains on the right tokens, or one message says what to do."""

import json
from dataclasses import replace

import pytest

from deltaw.config import DataConfig
from deltaw.data import encode, read
from deltaw.data.prompts import item_numbers
from deltaw.data.records import notes_of
from deltaw.errors import ConfigError, DataError
from deltaw.runs.survey import survey

from .conftest import CHATML, tiny_tokenizer

END = "<|im_end|>"
USER, ANSWER = {"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def taught(path, **config):
    """Return (what stands before, what is taught) of each record, decoded, and the notes on the data."""
    config, tokenizer = DataConfig(**config), tiny_tokenizer(CHATML)
    records = read(path, config)
    if records.form == "prompt":
        config = replace(config, template="plain")
    encoded = encode(records, tokenizer, config)
    pairs = []
    for example in encoded.examples:
        first = example.supervised.index(True)
        spans = [i for i, is_taught in zip(example.input_ids, example.supervised, strict=True) if is_taught]
        pairs.append((tokenizer.decode(example.input_ids[:first]), tokenizer.decode(spans)))
    return pairs, notes_of([records])


def failure(source, error=DataError, **config):
    with pytest.raises(error) as caught:
        read(source, DataConfig(**config))
    return str(caught.value)


PLAIN = [("ab", f"cd{END}")]
CHAT = [(f"<|im_start|>user\nab{END}\n<|im_start|>assistant\n", f"cd{END}")]
SYSTEM = [(f"<|im_start|>system\nS{END}\n{CHAT[0][0]}", f"cd{END}")]

TRAINS = {
    "question-answer.jsonl": (lines({"question": "ab", "answer": "cd"}), {}, PLAIN),
    "capitals.jsonl": (lines({"Question": "ab", "ANSWER": "cd"}), {}, PLAIN),
    "query-response.jsonl": (lines({"query": "ab", "response": "cd"}), {}, PLAIN),
    "input-output.jsonl": (lines({"input": "ab", "output": "cd"}), {}, PLAIN),
    "source-target.json": (json.dumps([{"source": "ab", "target": "cd"}]), {}, PLAIN),
    "prompt-response.jsonl": (lines({"prompt": "ab", "response": "cd", "source": "web"}), {}, PLAIN),
    "instruction-response.jsonl": (lines({"instruction": "ab", "context": "", "response": "cd"}), {}, CHAT),
    "alpaca.jsonl": (lines({"instruction": "a", "input": "b", "output": "cd"}), {}, [(CHAT[0][0].replace("ab", "a\n\nb"), CHAT[0][1])]),
    "alpaca-system.jsonl": (lines({"instruction": "ab", "output": "cd", "system": "S"}), {}, SYSTEM),
    "alpaca-history.csv": ('instruction,output,history\nef,gh,"[[""ab"", ""cd""]]"\n', {}, [(CHAT[0][0], f"cd{END}gh{END}")]),
    "orca.jsonl": (lines({"System Prompt": "S", "question": "ab", "response": "cd"}), {}, SYSTEM),
    "trl.jsonl": (lines({"prompt": [USER], "completion": [ANSWER]}), {}, CHAT),
    "trl-half.jsonl": (lines({"prompt": [USER], "completion": "cd"}), {}, CHAT),
    "mixed.jsonl": (lines({"prompt": "ab", "completion": "cd"}, {"question": "ab", "answer": "cd"}), {}, PLAIN * 2),
    "answers.jsonl": (
        lines({"prompt": "ab", "completion": ["cd", "ef"]}), {}, [("ab", f"cd{END}"), ("ab", f"ef{END}")],
    ),
    "renamed.jsonl": (lines({"q": "ab", "a": "cd", "answer": "x"}), {"columns": "prompt=q, completion=a"}, PLAIN),
    "nested.jsonl": (
        lines({"q": "ab", "choices": [{"text": "cd"}, {"text": "x"}]}), {"columns": "prompt=q,completion=choices.0.text"}, PLAIN,
    ),
    "dotted.jsonl": (lines({"q.0": "ab", "a, b": "cd"}), {"columns": "prompt=q.0,completion=a, b"}, PLAIN),
    "squad.jsonl": (
        lines({"question": "ab", "answers": {"text": ["cd"], "answer_start": [1]}}), {"columns": "completion=answers.text,prompt=question"}, PLAIN,
    ),
    "preferred.jsonl": (lines({"prompt": "ab", "chosen": "cd", "rejected": "x"}), {"columns": "completion=chosen"}, PLAIN),
    "kept-label.jsonl": (lines({"prompt": "ab", "completion": "cd", "label": True}), {"columns": "ignore=label"}, PLAIN),
    "topic-label.jsonl": (lines({"prompt": "ab", "completion": "cd", "label": "sport"}), {}, PLAIN),
    "equal-weights.jsonl": (lines(*[{"prompt": "ab", "completion": "cd", "weight": 1.0}] * 2), {}, PLAIN * 2),
    "ultrachat.jsonl": (lines({"prompt": "ab", "prompt_id": "7", "messages": [USER, ANSWER]}), {}, CHAT),
    "semicolons.csv": ("prompt;completion\nab;cd\n", {}, PLAIN),
    "tabs.csv": ("prompt\tcompletion\nab\tcd\n", {}, PLAIN),
    "tabs.tsv": ("prompt\tcompletion\nab\tcd\n", {}, PLAIN),
    "commas.csv": ('prompt,completion\n"a;b",cd\n', {}, [("a;b", f"cd{END}")]),
    "excel.csv": (
        b'\xef\xbb\xbfPrompt;Completion;\r\n"a;\nb";"c ""d""";\r\n;;\r\n', {}, [("a;\nb", f'c "d"{END}')],
    ),
    "excel-sep.csv": ("sep=;\r\nprompt;completion\r\nab;cd\r\n", {}, PLAIN),
    "macintosh.csv": ('prompt,completion\r"a\rb",cd\r', {}, [("a\nb", f"cd{END}")]),
    "pandas.csv": (",prompt,completion\n0,ab,cd\n1,ab,cd\n", {}, PLAIN * 2),
    "spaces.csv": ('prompt, completion\nab, "c, d"\n', {}, [("ab", f"c, d{END}")]),
    "western.csv": ("prompt,completion\né,ü\n".encode("cp1252"), {"encoding": "cp1252"}, [("é", f"ü{END}")]),
    "spread.json": (json.dumps({"prompt": "ab", "completion": "cd"}, indent=2), {}, PLAIN),
    "jq.jsonl": ("\n".join([json.dumps({"prompt": "ab", "completion": "cd"}, indent=1)] * 2), {}, PLAIN * 2),
    "array.jsonl": ("[\n" + json.dumps({"prompt": "ab", "completion": "cd"}) + "\n]\n", {}, PLAIN),
    "openai-pairs.jsonl": (
        lines({"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [USER]}),
        {"columns": "prompt=input.messages,completion=preferred_output"}, CHAT,
    ),
    "scores-of-pairs.jsonl": (lines({"prompt": "ab", "completion": "cd", "score_chosen": 1, "score_rejected": 0}), {}, PLAIN),
    "kept-thoughts.jsonl": (lines({"prompt": "ab", "completion": "cd", "reasoning": "x"}), {"columns": "ignore=reasoning"}, PLAIN),
    "wide.jsonl": (lines({"prompt": "é", "completion": "ü"}).encode("utf-16"), {"encoding": "utf-16"}, [("é", f"ü{END}")]),
    "paragraphs.txt": ("\nab\ncd\r\n\r\nef\n", {}, [("a", f"b\ncd{END}"), ("e", f"f{END}")]),
    "sections.md": (
        "Xa\n\n# T\n## U\nV\n```\n# no\n\n```\n# W\nY\n", {},
        [("X", f"a{END}"), ("#", f" T\n## U\nV\n```\n# no\n\n```{END}"), ("#", f" W\nY{END}")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINS)
def test_a_file_trains_on_the_right_tokens(tmp_path, name):
    content, config, pairs = TRAINS[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert taught(path, **config)[0] == pairs


GOOD = {"prompt": "ab", "completion": "cd"}
REFUSED = {
    "kto.jsonl": (lines(GOOD | {"label": False}, GOOD | {"label": True}), {}, ["'label' (2 records: kto.jsonl:1, kto.jsonl:2)", "KTO", "ignore=NAME"]),
    "kto.csv": ("question,answer,label\nab,cd,0\n", {}, ["'label'", "KTO", "--columns text=question,text_pair=answer"]),
    "kto-causal.jsonl": (lines(GOOD | {"label": False}), {"task": "causal", "form": "prompt"}, ["KTO"]),
    "kto-chat.jsonl": (lines({"messages": [USER, ANSWER], "label": False}), {}, ["'label'", "KTO"]),
    "steps.jsonl": (lines({"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}), {}, ["'labels'", "steps"]),
    "pairs.jsonl": (lines({"prompt": "a", "chosen": "b", "rejected": "c"}), {}, ["preference pair", "not trained on yet", "--columns prompt=prompt,completion=chosen"]),
    "pairs-chat.jsonl": (lines({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}), {}, ["--columns messages=chosen"]),
    "late-pair.jsonl": (lines(*[GOOD] * 30, GOOD | {"chosen": "b", "rejected": "c"}), {}, ["1 of 31", "late-pair.jsonl:31"]),
    "pairs-openai.jsonl": (lines({"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]}), {}, ["preference pair", "prompt=input.messages,completion=preferred_output"]),
    "pairs-names.jsonl": (lines({"question": "a", "chosen_response": "b", "rejected_response": "c"}), {}, ["preference pair", "completion=chosen_response"]),
    "pairs-factory.jsonl": (lines({"conversations": [USER, ANSWER, USER], "chosen": ANSWER, "rejected": ANSWER}), {}, ["preference pair", "at the end of its conversation"]),
    "worse.jsonl": (lines({"messages": [USER, ANSWER], "rejected_response": "x"}), {}, ["'rejected_response'", "worse answer", "ignore=rejected_response"]),
    "kto-factory.jsonl": (lines({"messages": [USER, ANSWER], "kto_tag": False}), {}, ["'kto_tag'", "KTO"]),
    "splits.csv": ("prompt,completion,split\na,b,train\nc,d,test\n", {}, ["'split' (2 records", "a file of its own"]),
    "null-turns.jsonl": (lines({"messages": [USER, ANSWER]}, {"messages": None}), {}, ["null-turns.jsonl:2: field 'messages' is null"]),
    "squad.jsonl": (lines({"question": "a", "answers": {"text": ["b"]}}), {}, ["no known form", "--columns prompt=FIELD"]),
    "empty.txt": ("", {}, ["no records in it"]),
    "blank.md": ("\n \n", {}, ["no records in it"]),
    "thoughts.jsonl": (lines(GOOD | {"reasoning_content": "x"}), {}, ["'reasoning_content' (1 record", "beside the answer's content"]),
    "labels.csv": ("text,labels\na,b\n", {}, ["'labels'", "--columns label=labels"]),
    "within.jsonl": (lines({"id": 1, "body": {"messages": [USER, ANSWER]}}), {}, ["the object 'body'", "--columns messages=body.messages"]),
    "row.jsonl": (lines({"row": {"Question": "a", "answer": "b"}}), {}, ["--columns prompt=row.Question,completion=row.answer"]),
    "chat.jsonl": (lines({"chat": [USER, ANSWER]}), {}, ["--columns messages=chat"]),
    "strings.jsonl": (lines({"dialog": ["a", "b"]}), {}, ["'dialog' must be a list of messages", "['a', 'b']"]),
    "single.jsonl": (lines(USER, ANSWER), {}, ["single messages", '{"messages":']),
    "bare-turns.jsonl": (lines([USER, ANSWER], [USER, ANSWER]), {}, ["bare-turns.jsonl:2", '{"messages": […]}']),
    "splits.json": (json.dumps({"train": [GOOD], "valid": [GOOD]}), {}, ["'train' holds a list of objects", "jq '.valid'"]),
    "commas.jsonl": ((lines(GOOD)[:-1] + ",\n") * 2, {}, ["commas.jsonl:2", "Remove the comma after the record"]),
    "last-comma.json": ("[" + lines(GOOD) + ",]", {}, ["Remove the comma before the ]"]),
    "python.jsonl": (str(GOOD), {}, ["python.jsonl:1", "json.dumps"]),
    "one-line.jsonl": (lines(GOOD)[:-1] * 2, {}, ["on a line of its own"]),
    "csv.jsonl": ("prompt,completion\na,b\n", {}, ["name it .csv"]),
    "json.csv": (lines(GOOD), {}, ["json.csv:1", "Name the file json.jsonl"]),
    "spread-late.json": (json.dumps(GOOD, indent=1) + "\n" + json.dumps(GOOD, indent=1)[:-3], {}, ["1 of 2", "spread-late.json:7", "not JSON"]),
    "images.jsonl": (lines(GOOD, GOOD | {"images": ["a.png"]}), {}, ["'images' (1 record: images.jsonl:2)", "texts alone"]),
    "captions.jsonl": (lines({"text": "ab", "image": "a.png"}), {}, ["'image'", "texts alone"]),
    "chat-images.jsonl": (lines({"messages": [USER, ANSWER], "images": ["a.png"]}), {}, ["'images'"]),
    "weights.jsonl": (lines(GOOD | {"weight": 1}, GOOD | {"weight": 0.5}), {}, ["'weight' (2 records", "not weighed"]),
    "scores.csv": ("text,score\nab,1\ncd,2\n", {}, ["'score'", "--columns label=score"]),
    "two.jsonl": (lines(GOOD | {"messages": [USER, ANSWER]}), {}, ["prompt (prompt, completion) and chat (messages)", "Set form"]),
    "two-answers.jsonl": (lines(GOOD | {"response": "x"}), {}, ["prompt (prompt, response)", "--columns prompt=prompt,completion=completion"]),
    "late-two.jsonl": (lines(*[GOOD] * 30, GOOD | {"messages": [USER, ANSWER]}), {}, ["1 record: late-two.jsonl:31", "prompt (prompt, completion) and chat (messages)"]),
    "context.jsonl": (lines({"question": "a", "context": "b", "answer": "c"}), {}, ["'context'", "--columns instruction=question,input=context,output=answer"]),
    "tools.jsonl": (lines(GOOD | {"tools": [{"name": "f"}]}), {}, ["'tools'", "messages"]),
    "capitals.jsonl": (lines({"Prompt": "a", "prompt": "b", "completion": "c"}), {}, ["'Prompt' and 'prompt'"]),
    "history.jsonl": (lines({"instruction": "a", "output": "b", "history": "none"}), {}, ["history.jsonl:1", "'history'", "pairs"]),
    "no-answer.jsonl": (lines(GOOD, {"prompt": "a", "completion": []}), {}, ["no-answer.jsonl:2", "without an answer"]),
    "empty-answer.jsonl": (lines({"Question": "a", "Answer": ["b", " "]}), {}, ["empty-answer.jsonl:1, answer 2", "'Answer[1]' is empty"]),
    "missing.jsonl": (lines({"question": "a", "answer": "b"}, {"question": "a"}), {}, ["missing.jsonl:2", "'answer' is missing"]),
    "western.csv": ("prompt,completion\na,b\né,ü\n".encode("cp1252"), {}, ["western.csv:3", "--encoding cp1252"]),
    "western.txt": ("é".encode("cp1252"), {}, ["western.txt:1", "--encoding cp1252"]),
    "wrong.csv": (b"prompt,completion\na,\x81\n", {"encoding": "cp1252"}, ["wrong.csv:2", "not cp1252", "--encoding"]),
    "unnamed.csv": ("prompt;completion;\na;b;c\n", {}, ["unnamed.csv:2", "no column's name"]),
    "unnamed-first.csv": (",prompt,completion\nx,a,b\n", {}, ["none of its 1 records", "unnamed-first.csv:2", "no column's name"]),
    "named-turns.jsonl": (lines({"conv": [USER, {"role": "poet", "content": "x"}]}), {"columns": "messages=conv"}, ["conv[1]: unknown role 'poet'"]),
    "ragged.csv": ("prompt;completion\na;b\na;b;c\n", {}, ["ragged.csv:3", "3 cells under 2", "semicolons"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_with_what_to_do(tmp_path, name):
    content, config, words = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = failure(path, **config)
    assert all(word in message for word in words), message


def test_fields_that_are_not_used_are_named_once_with_their_records():
    rows = [GOOD | {"ticket_id": i, "priority": "high", "note": "" if i else "x"} for i in range(3)]
    assert taught(rows)[1] == ("ignored: ticket_id, priority (3 records); note (1 record)",)
    first, second = read(rows, DataConfig()), read([GOOD | {"priority": "low"}], DataConfig())
    assert notes_of([first, None, second]) == ("ignored: ticket_id (3 records); priority (4 records); note (1 record)",)
    chat = [{"messages": [USER, ANSWER], "id": 1}]
    assert taught(chat)[1] == ("ignored: id (1 record)",)
    assert taught([{"Question": "ab", "answer": "cd", "score": 3}], columns="ignore=score")[1] == (
        "taken: Question as prompt, answer as completion", "ignored: score (1 record)",
    )  # fmt: skip
    assert notes_of([read([GOOD | {"id": 1}], DataConfig(), completions=False)]) == ("ignored: id (1 record)",)


def test_a_system_message_and_earlier_turns_make_conversations_of_all_records():
    turns = [["q1", "a1"], ["q2", "a2"]]
    rows = [
        {"instruction": "ab", "output": "cd", "history": turns},
        {"instruction": "ab", "output": "cd", "history": []},
    ]
    (first, second), _ = taught(rows)
    assert first == ("<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n", f"a1{END}a2{END}cd{END}")
    assert second == CHAT[0]
    records = read(rows, DataConfig())
    assert records.form == "chat" and [m.content for m in records.items[0].context] == ["q1", "a1", "q2", "a2", "ab"]
    assert "several system messages" in failure([{**GOOD, "system": "a", "system_prompt": "b"}])
    assert "history[0]" in failure([{**GOOD, "history": [["a"]]}])
    with pytest.raises(DataError, match="chat records"):
        encode(records, tiny_tokenizer(), DataConfig())


def test_answers_in_a_prompt_of_messages_are_context():
    rows = [{"prompt": [USER, {"role": "assistant", "content": "no"}, USER], "completion": [ANSWER]}]
    ((before, after),), _ = taught(rows)
    assert after == f"cd{END}" and "no" in before


def test_several_answers_are_one_item_and_references_of_each_other():
    records = read([{"question": "ab", "answer": ["cd", "ef"]}, {"question": "x", "answer": ["y"]}], DataConfig())
    assert item_numbers(records.items) == [0, 0, 1]
    assert [r.place for r in records] == ["records[0], answer 1", "records[0], answer 2", "records[1]"]


def test_records_of_several_forms_are_refused():
    assert "several forms, prompt (prompt, completion) and chat (messages)" in failure(
        [GOOD, {"messages": [USER, ANSWER]}]
    )


def test_columns_that_have_no_place_or_are_not_there_are_refused():
    rows = [{"q": {"text": "a", "lang": "de"}, "choices": [{"text": "b"}], "id": 1}]
    good = "prompt=q.text,completion=choices.0.text"
    assert len(read(rows, DataConfig(columns=good))) == 1
    message = failure(rows, columns=f"{good},input=q.lang")
    assert (
        "columns names input, which prompt records (completion, prompt) have no place for: it would be lost" in message
    )
    assert "no record has 'idd' to leave out (did you mean 'id'?)" in failure(
        rows, ConfigError, columns=f"{good},ignore=idd"
    )
    assert len(read(rows, DataConfig(columns=f"{good},ignore=somewhere_else"))) == 1  # of another file, perhaps
    assert "there is no 'question' to take 'q.text' as: it is prompt here" in failure(
        rows, ConfigError, columns="question=q.text,completion=choices.0.text"
    )
    assert "its prompts are there, and nothing that answers them" in failure(rows, columns="prompt=q.text")


def test_records_that_count_for_nothing_or_more_are_refused():
    row = {"prompt": "a", "completion": "b"}
    for weights in ([None, 0], [0, 0], [1, 2], [None, "0.5"], [[1, 0], [1, 1]]):
        rows = [row if weight is None else row | {"weight": weight} for weight in weights]
        message = failure(rows)
        assert "'weight'" in message and "records are not weighed yet" in message and "--columns label" not in message
    for weights in ([1, None], [1.0, "1"], [2, 2]):
        assert len(read([row if weight is None else row | {"weight": weight} for weight in weights], DataConfig())) == 2
    assert len(read([row, row | {"score": 3}], DataConfig())) == 2


@pytest.mark.parametrize("name", ["split", "Split", "SPLIT"])
def test_a_column_of_splits_is_refused_in_any_capitals(name):
    rows = [{"prompt": "a", "completion": "b", name: split} for split in ("train", "Test")]
    assert "says which records are held out" in failure(rows)


def test_columns_are_checked_in_one_message():
    rows = [{"question": "a", "choices": [{"text": "b"}]}]
    message = failure(
        rows, ConfigError, columns="promt=question,completion=choices.0.txt,completion=question,instruction"
    )
    assert (
        "did you mean 'prompt'" in message and "no record has 'choices.0.txt' (did you mean 'choices.0.text'" in message
    )
    assert "completion has two columns, 'choices.0.txt' and 'question,instruction'" in message
    assert "'question' is no NAME=COLUMN" in failure(rows, ConfigError, columns="question")
    assert "wrong way round: prompt=question" in failure(rows, ConfigError, columns="question=prompt")
    assert "no record has 'Z'; they have question, choices" in failure(rows, ConfigError, columns="prompt=Z")
    with pytest.raises(ConfigError, match=r"'utf-88'.*did you mean 'utf-8'"):
        DataConfig(encoding="utf-88")


def test_columns_decide_where_fields_fit_two_forms():
    row = {"instruction": "ab", "output": "cd", "prompt": "Below is ab", "text": "all"}
    assert "fit more than one form" in failure([row])
    assert read([row], DataConfig(columns="instruction=instruction,output=output")).form == "instruction"
    assert read([row], DataConfig(form="instruction")).form == "instruction"
    records = read([row | {"completion": "x"}], DataConfig(columns="prompt=instruction,completion=output"))
    assert [(r.prompt, r.completion) for r in records] == [("ab", "cd")]
    assert records.ignored == {"prompt": 1, "text": 1, "completion": 1}


def test_prompts_alone_need_no_answers():
    def prompts(row, **config):
        return [r.question for r in read([row], DataConfig(**config), completions=False)]

    assert prompts({"Question": "ab"}) == prompts({"prompt": "ab", "chosen": "x", "rejected": "y"}) == ["ab"]
    assert prompts({"prompt": "ab", "source": "web", "label": False}) == prompts({"source": "ab"}) == ["ab"]
    assert prompts({"q": "ab"}, columns="prompt=q,completion=a") == ["ab"]


def test_a_survey_names_the_fields_that_are_not_used(tmp_path):
    (tmp_path / "train.jsonl").write_text(lines(*[GOOD | {"id": i} for i in range(3)]))
    (tmp_path / "valid.jsonl").write_text(lines(GOOD | {"id": 9}))
    assert survey(tmp_path).notes == ("ignored: id (4 records)",)


def test_separators_and_cuts_are_stated(tmp_path):
    (tmp_path / "a.csv").write_text("prompt;completion\nab;cd\n")
    assert taught(tmp_path / "a.csv")[1] == ("a.csv: its columns are divided by semicolons",)
    (tmp_path / "b.txt").write_text("ab\n\ncd\n")
    assert taught(tmp_path / "b.txt")[1] == ("b.txt: each of its 2 paragraphs is a record",)
    (tmp_path / "c.md").write_text("# a\nb\n")
    assert taught(tmp_path / "c.md")[1] == ("c.md: each of its 1 sections is a record",)


def test_a_folder_of_documents_has_a_record_for_each(tmp_path):
    for name, text in (("b.md", "# ab\n\ncd\n"), ("a.txt", "ab\n\ncd\n")):
        (tmp_path / name).write_text(text)
    pairs, notes = taught(tmp_path)
    assert pairs == [("a", f"b\n\ncd{END}"), ("#", f" ab\n\ncd{END}")]
    assert notes == (f"{tmp_path}: 2 text files, each a record",)
    (tmp_path / "train.jsonl").write_text(lines(GOOD))
    assert taught(tmp_path)[0] == PLAIN  # a README beside records is none
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.txt").write_text("ab\n\ncd\n")
    assert [r.completion for r in read(tmp_path, DataConfig())] == ["ab", "cd"]


def test_preference_pairs_and_tool_calls_of_real_data(data_folder):
    message = failure(data_folder / "pref")
    assert "3,000 of 3,000 records" in message and "--columns prompt=prompt,completion=chosen" in message
    chosen = read(data_folder / "pref", DataConfig(columns="completion=chosen"))
    assert notes_of([chosen]) == ("ignored: rejected (3,000 records)",)
    with (data_folder / "pref" / "train.jsonl").open(encoding="utf-8") as file:
        first = json.loads(next(file))
    assert (chosen.items[0].prompt, chosen.items[0].completion) == (first["prompt"], first["chosen"])
    tools = read(data_folder / "tools", DataConfig())
    assert tools.form == "chat" and len(tools) == 2058 and not tools.ignored
