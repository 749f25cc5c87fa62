"""A base whose tokenizer ends texts with one token and whose chat template ends turns with another: what is trained on it stops,
wherever its adapter goes."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import deltaw
from deltaw.cli.main import main
from deltaw.config import GenerateConfig
from deltaw.errors import FileError
from deltaw.files.formats import correction, model_folder, peft
from deltaw.model.ends import taught, teach
from tests.conftest import byte_llama, fill
from tests.data.conftest import CHATML, tiny_tokenizer

WORDS = ("all", "Hello", "no")
CHATS = [
    {"messages": [{"role": "user", "content": f"say {w}"}, {"role": "assistant", "content": w}]}
    for w in WORDS
    for _ in "12345678"
]
END, EOS = "<|im_end|>", "<|endoftext|>"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, result): base/, data.jsonl and the run/ of an adapter that has learnt its answers by heart."""
    folder = tmp_path_factory.mktemp("ends")
    tokenizer = tiny_tokenizer(CHATML, eos=EOS, special=(EOS,))
    tokenizer.pad_token = EOS
    byte_llama(tokenizer, tie_word_embeddings=False).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "data.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    config = deltaw.TrainConfig(
        out=str(folder / "run"), steps=80, lr=1.5e-2, batch=4, valid=str(folder / "data.jsonl"), samples=2
    )
    return folder, deltaw.train(str(folder / "base"), folder / "data.jsonl", config, method=deltaw.Full())


def plainly(folder: Path, *, prompt: str = "say Hello") -> str:
    """What plain transformers says, with nothing but the folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = AutoModelForCausalLM.from_pretrained(folder).generate(**inputs, max_new_tokens=40, do_sample=False)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]))


def test_a_run_teaches_its_adapter_where_to_stop(trained: Any) -> None:
    _, result = trained
    assert result.state.last_loss < 0.2
    end = result.tokenizer.convert_tokens_to_ids(END)
    assert taught(result.model, ["default"]) == (end,) == deltaw.summary(result.model).adapters["default"].ends
    assert [s.after for s in result.samples] == [s.reference for s in result.samples]
    assert [w.split(" prompts ")[0] for w in result.warnings] == ["3 of 3 held-out"]  # nothing of ends


def test_eval_stops_where_the_adapter_was_taught_to(trained: Any, tmp_path: Path) -> None:
    folder, _ = trained
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS[::8]))
    words = ["eval", str(folder / "base"), str(tmp_path / "few.jsonl"), "--adapter", str(folder / "run/adapter")]
    assert main([*words, "--max-new-tokens", "40", "--no-base", "--out", str(tmp_path / "e.json")]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["adapter"]["scores"]["exact_match"]["value"] == 1.0


def test_generate_stops_where_the_adapter_was_taught_to(trained: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = trained
    words = ["generate", str(folder / "base"), "say Hello", "--adapter", str(folder / "run/adapter")]
    assert main([*words, "--max-new-tokens", "40"]) == 0
    assert capsys.readouterr().out == "Hello\n"


@pytest.mark.parametrize("beams", ["1", "2"])
def test_a_chat_stops_where_the_adapter_was_taught_to(
    trained: Any, beams: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = trained
    words = ["chat", str(folder / "base"), "--adapter", str(folder / "run/adapter"), "--max-new-tokens", "40"]
    monkeypatch.setattr("sys.stdin", io.StringIO("say all\n/new\nsay no\n/quit\n"))
    assert main([*words, "--beams", beams]) == 0
    shown = capsys.readouterr().out
    assert "model › all\n" in shown and "model › no\n" in shown and END not in shown


def test_the_adapter_alone_knows_its_end(trained: Any) -> None:
    """Loaded where the template is gone: from a plain prompt it still stops where it was taught to."""
    folder, _ = trained
    model, tokenizer = (c.from_pretrained(folder / "base") for c in (AutoModelForCausalLM, AutoTokenizer))
    prompt = tokenizer("<|im_start|>user\nsay all<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    tokenizer.chat_template = None
    deltaw.load(model, folder / "run/adapter")
    assert deltaw.model.generate.generate(model, tokenizer, [prompt], GenerateConfig(max_new_tokens=40)) == ["all"]
    end = tokenizer.convert_tokens_to_ids(END)
    assert peft.ends_of(deltaw.files.store.read(folder / "run/adapter").metadata, folder) == (end,)


@pytest.mark.parametrize("way", ["command", "memory"])
def test_what_it_is_merged_into_stops_by_itself(trained: Any, way: str, tmp_path: Path) -> None:
    folder, _ = trained
    if way == "command":
        assert main(["merge", str(folder / "base"), str(folder / "run/adapter"), "-o", str(tmp_path / "m")]) == 0
    else:
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        before = model.generation_config.eos_token_id
        deltaw.load(model, folder / "run/adapter")
        deltaw.merge(model)
        model.save_pretrained(tmp_path / "m")
        AutoTokenizer.from_pretrained(folder / "base").save_pretrained(tmp_path / "m")
        deltaw.unmerge(model)
        assert model.generation_config.eos_token_id == before
        deltaw.merge(model)
        deltaw.detach(model)
        assert model.generation_config.eos_token_id == before
    assert plainly(tmp_path / "m") == f"Hello{END}"


# --- files of an adapter with an end ------------------------------------------------------------------------------


def with_end(folder: Path, *ends: int, name: str = "adapter", seed: int = 3, rank: int = 4) -> Path:
    """A base in `folder` and an adapter on it that was taught these ends."""
    tokenizer = tiny_tokenizer()
    model = byte_llama(tokenizer)
    model.generation_config.eos_token_id = 2
    if not (folder / "base").exists():
        model.save_pretrained(folder / "base", max_shard_size="30KB")
        tokenizer.save_pretrained(folder / "base")
    fill(deltaw.attach(model, deltaw.LoRA(rank=rank, alpha=6)), seed=seed)
    teach(model, "default", ends)
    return deltaw.save(model, folder / name)


def ends_in(adapter: Path) -> tuple[int, ...]:
    return peft.ends_of(peft.read(adapter).metadata, adapter)


@pytest.mark.parametrize("eos", [[2, 90], 2, None, "absent", "no file"])
@pytest.mark.parametrize("reversible", [False, True])
def test_a_merge_on_disk_extends_what_the_base_says_and_a_reversible_one_gives_it_back(
    eos: Any, reversible: bool, tmp_path: Path
) -> None:
    adapter, path = with_end(tmp_path, 77, 90), tmp_path / "base" / model_folder.GENERATION_CONFIG
    own = json.loads(path.read_text()) | {"temperature": 0.3, "do_sample": True, "eos_token_id": eos}
    if eos == "absent":
        del own["eos_token_id"]
    path.write_text(json.dumps(own))
    before = (
        []
        if eos in (None, "absent")
        else [tiny_tokenizer().eos_token_id]
        if eos == "no file"
        else eos
        if isinstance(eos, list)
        else [eos]
    )
    if eos == "no file":
        path.unlink()
    deltaw.merge_files(tmp_path / "base", adapter, tmp_path / "m", reversible=reversible)
    after = json.loads((tmp_path / "m" / model_folder.GENERATION_CONFIG).read_text())
    assert after["eos_token_id"] == list(dict.fromkeys([*before, 77, 90]))
    if eos == "no file":
        assert after["bos_token_id"] == tiny_tokenizer().bos_token_id
    else:
        assert after["temperature"] == 0.3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").generation_config.eos_token_id == after["eos_token_id"]
    deltaw.unmerge_files(tmp_path / "m", adapter, tmp_path / "back")
    back = tmp_path / "back" / model_folder.GENERATION_CONFIG
    if reversible:
        assert back.read_bytes() == path.read_bytes() if path.is_file() else not back.exists()
    else:
        assert json.loads(back.read_text()) == after, "only a correction knows what the base said"
    assert not (tmp_path / "back" / correction.NAME).exists()


def test_a_merge_without_ends_leaves_the_file_alone(tmp_path: Path) -> None:
    adapter, path = with_end(tmp_path), tmp_path / "base" / model_folder.GENERATION_CONFIG
    deltaw.merge_files(tmp_path / "base", adapter, tmp_path / "m")
    assert (tmp_path / "m" / model_folder.GENERATION_CONFIG).read_bytes() == path.read_bytes()
    with_end(tmp_path, 2, name="own")
    deltaw.merge_files(tmp_path / "base", tmp_path / "own", tmp_path / "n")
    assert (tmp_path / "n" / model_folder.GENERATION_CONFIG).read_bytes() == path.read_bytes()


def test_merges_in_memory_and_on_disk_write_the_same_end_tokens(tmp_path: Path) -> None:
    adapter = with_end(tmp_path, 77)
    words = ["merge", str(tmp_path / "base"), str(adapter), "-o"]
    assert main([*words, str(tmp_path / "disk"), "--check", "off"]) == 0
    assert main([*words, str(tmp_path / "memory"), "--dtype", "float32"]) == 0
    for name in ("disk", "memory"):
        assert json.loads((tmp_path / name / model_folder.GENERATION_CONFIG).read_text())["eos_token_id"] == [2, 77]


def test_what_is_made_of_adapters_carries_their_ends(tmp_path: Path) -> None:
    one, other, third = (
        with_end(tmp_path, *ends, name=name, seed=seed, rank=2 + seed)
        for seed, (name, ends) in enumerate({"one": (77,), "other": (88, 77), "third": (91,)}.items())
    )
    deltaw.compress(one, tmp_path / "cut", rank=1)
    assert ends_in(tmp_path / "cut") == (77,)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for path in (one, other, third):
        deltaw.load(model, path, name=path.name)
    deltaw.combine(model, {"one": 0.5, "other": 2.0, "third": -1.0}, name="sum")
    assert ends_in(deltaw.save(model, tmp_path / "sum", name="sum")) == (77, 88), "what is taken away teaches nothing"
    deltaw.merge(model, weights={"other": 1.0, "third": -0.5})
    assert model.generation_config.eos_token_id == [2, 88, 77]
    deltaw.unmerge(model, "other")
    assert model.generation_config.eos_token_id == 2
    deltaw.unmerge(model)
    deltaw.detach(model)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tuned.generation_config.eos_token_id = [2, 60]
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight += 0.1
    deltaw.extract(model, tuned, rank=2, name="found")
    assert ends_in(deltaw.save(model, tmp_path / "found", name="found")) == (60,)


def test_llama_cpp_s_file_keeps_the_ends(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    adapter = with_end(tmp_path, 77, 90)
    deltaw.convert(adapter, tmp_path / "a.gguf", base=tmp_path / "base")
    assert ends_in(deltaw.convert(tmp_path / "a.gguf", tmp_path / "back", base=tmp_path / "base")) == (77, 90)


@pytest.mark.parametrize("damage", ["{", "7", "[-1]", '["a"]', "[true]"])
def test_damaged_ends_are_an_error_before_the_model_is_touched(damage: str, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from deltaw.files.formats.peft.metadata import sealed

    adapter = with_end(tmp_path, 77)
    path = adapter / peft.WEIGHTS
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file(tensors, path, sealed(tensors, metadata | {peft.ENDS: damage}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(FileError, match="end tokens in the metadata"):
        deltaw.load(model, adapter)
    assert deltaw.adapters(model) == ()
    with pytest.raises(FileError, match="end tokens in the metadata"):
        deltaw.merge_files(tmp_path / "base", adapter, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_what_another_loop_taught_is_told_to_save(tmp_path: Path) -> None:
    with_end(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fill(deltaw.attach(model, deltaw.LoRA(rank=2, alpha=3.0)))
    assert ends_in(deltaw.save(model, tmp_path / "a", ends=[77, 5, 77])) == (77, 5)
    assert ends_in(deltaw.save(model, tmp_path / "b")) == (77, 5)
    assert ends_in(deltaw.save(model, tmp_path / "c", ends=[])) == ()


def test_a_chat_samples_by_its_seed(
    trained: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = trained
    words = ["chat", str(folder / "base"), "--temperature", "1", "--max-new-tokens", "6", "--seed"]

    def said(seed: str, number: int) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("say all\n/new\nsay all\n/quit\n"))
        torch.manual_seed(number)
        assert main([*words, seed]) == 0
        return capsys.readouterr().out

    assert said("3", 1) == said("3", 2) != said("4", 2)


def test_a_chat_says_where_nothing_ends_a_reply(
    trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = trained
    shutil.copytree(folder / "base", tmp_path / "base")
    for end, said in ((END, False), ("\nUser:", True)):
        tokenizer = AutoTokenizer.from_pretrained(folder / "base")
        tokenizer.chat_template = CHATML.replace("{{ m.content }}<|im_end|>", "{{ m.content }}" + end)
        tokenizer.save_pretrained(tmp_path / "base")
        monkeypatch.setattr("sys.stdin", io.StringIO("/quit\n"))
        assert main(["chat", str(tmp_path / "base")]) == 0
        assert ("in no token to stop at" in capsys.readouterr().out) is said
        (tmp_path / "few.jsonl").write_text(json.dumps(CHATS[0]) + "\n")
        for words in (
            ["eval", str(tmp_path / "base"), str(tmp_path / "few.jsonl")],
            ["generate", str(tmp_path / "base")],
        ):
            words += ["--file", str(tmp_path / "few.jsonl")] if words[0] == "generate" else []
            assert main([*words, "--max-new-tokens", "4"]) == 0
            assert ("in no token to stop at" in capsys.readouterr().err) is said


def test_a_plain_run_teaches_the_eos_that_generation_config_lacks(trained: Any, tmp_path: Path) -> None:
    """An instruction-tuned base, whose generation_config ends with the turn's token alone, trained on plain text."""
    folder, result = trained
    shutil.copytree(folder / "base", tmp_path / "base")
    end, eos = (result.tokenizer.convert_tokens_to_ids(token) for token in (END, EOS))
    path = tmp_path / "base" / model_folder.GENERATION_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": end}))
    plain = deltaw.DataConfig(template="plain")
    config = deltaw.TrainConfig(data=plain, out=str(tmp_path / "run"), steps=2, samples=0)
    pairs = [{"prompt": "a", "completion": "all"}] * 4
    deltaw.train(str(tmp_path / "base"), pairs, config, method=deltaw.LoRA(rank=4, alpha=6))
    deltaw.merge_files(tmp_path / "base", tmp_path / "run/adapter", tmp_path / "m")
    assert json.loads((tmp_path / "m" / model_folder.GENERATION_CONFIG).read_text())["eos_token_id"] == [end, eos]


def test_a_template_without_an_end_is_told_of_in_the_run(trained: Any, tmp_path: Path) -> None:
    folder, _ = trained
    model, tokenizer = (c.from_pretrained(folder / "base") for c in (AutoModelForCausalLM, AutoTokenizer))
    tokenizer.chat_template = CHATML.replace("{{ m.content }}<|im_end|>", "{{ m.content }}\nUser:")
    config = deltaw.TrainConfig(out=str(tmp_path / "run"), steps=2, samples=0)
    result = deltaw.train(model, CHATS[:3], config, method=deltaw.LoRA(rank=4, alpha=6), tokenizer=tokenizer)
    (text,) = result.warnings
    assert "in no special token but plain text ('\\nUser:" in text
    assert (
        "\\nUser:" in (tmp_path / "run/report.html").read_text()
        or "User:" in (tmp_path / "run/report.html").read_text()
    )
    assert ends_in(tmp_path / "run/adapter") == ()
