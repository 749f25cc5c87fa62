"""Whole models as GGUF: transformers reads them back to the same logits, within what the type can hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import deltaw
from deltaw import DataConfig, TrainConfig
from deltaw.cli import main
from deltaw.errors import FileError
from deltaw.files.publish.gguf_model import NAME, export_gguf
from tests.cli.conftest import Run, place, run  # noqa: F401
from tests.conftest import fill, tiny_gpt2
from tests.data.conftest import CHATML, tiny_tokenizer, write_chat_model

gguf = pytest.importorskip("gguf")
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def written(folder: Path, kind: str = "llama", **settings: Any) -> Path:
    """A model folder with a tokenizer, whose weights are large enough to matter."""
    torch.manual_seed(3)
    tokenizer = tiny_tokenizer(CHATML)
    # transformers reads no other size of a head from a Qwen's file
    config_class, model_class, head = {
        "llama": (LlamaConfig, LlamaForCausalLM, 16), "qwen2": (Qwen2Config, Qwen2ForCausalLM, 16),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM, 128),
    }[kind]  # fmt: skip
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    config = config_class(
        vocab_size=len(tokenizer) + 2, initializer_range=0.3, **SIZES | {"head_dim": head}, **ids, **settings
    )
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rounded(folder: Path, stored: str) -> Path:
    """The same model, its matrices as the type holds them."""
    from gguf.quants import dequantize, quantize

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            finer = stored == "q4_0" and ("embed_tokens" in name or "lm_head" in name)
            kind = gguf.GGMLQuantizationType["Q8_0" if finer else stored.upper()]
            if parameter.ndim > 1:
                parameter.copy_(torch.from_numpy(dequantize(quantize(parameter.numpy(), kind), kind)))
    model.save_pretrained(folder.parent / "rounded")
    return folder.parent / "rounded"


def logits(folder: Path, **where: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where).eval()
    with torch.no_grad():
        return model(torch.arange(5, 60).view(1, -1)).logits


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("stored", ["f32", "f16", "q8_0", "q4_0"])
def test_transformers_reads_the_same_model(kind: str, stored: Any, tmp_path: Path) -> None:
    theta = {"rope_type": "default", "rope_theta": 7e4}
    model = written(tmp_path / "m", kind, tie_word_embeddings=kind == "llama", rope_parameters=theta)
    done = export_gguf(model, tmp_path / "out", kind=stored)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".deltaw", "Modelfile", NAME] and not done.kept
    there = logits(tmp_path / "out", gguf_file=NAME)
    exact = logits(model)
    torch.testing.assert_close(there, logits(rounded(model, stored)), atol=1e-5, rtol=1e-5)
    assert torch.equal(there, exact) == (stored == "f32")
    types = {t.tensor_type.name for t in gguf.GGUFReader(done.file).tensors if len(t.shape) > 1}
    assert types == {stored.upper(), *(["Q8_0"] if stored == "q4_0" else [])}


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    model = written(tmp_path / "m")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 257]}))
    done = export_gguf(model, tmp_path / "out", kind="f16")
    ours = AutoTokenizer.from_pretrained(model)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=NAME)
    text = "Hi all a\n\nHello<|im_start|>user"
    assert theirs(text).input_ids == ours(text).input_ids and theirs.chat_template == CHATML
    file = gguf.GGUFReader(done.file)
    field = {k: f.contents() for k, f in file.fields.items() if k.startswith("tokenizer.ggml.")}
    assert field["tokenizer.ggml.pre"] == "gpt-2" and field["tokenizer.ggml.eos_token_id"] == ours.eos_token_id
    assert (
        len(field["tokenizer.ggml.tokens"]) == len(ours) + 2
        and field["tokenizer.ggml.token_type"][-1] == gguf.TokenType.UNUSED
    )
    ends = [ours.eos_token_id, *(i for i in (258, 257) if i != ours.eos_token_id)]
    stops = [f'PARAMETER stop "{ours.convert_ids_to_tokens(i)}"' for i in ends]
    assert (tmp_path / "out" / "Modelfile").read_text().splitlines() == [f"FROM ./{NAME}", *stops]


def test_the_system_message_of_training_goes_into_the_modelfile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = written(tmp_path / "m")
    (tmp_path / "d.jsonl").write_text('{"prompt": "Hi", "completion": "Hello"}\n' * 2)
    said = 'Answer in "JSON".\nBe brief.'
    config = TrainConfig(out=str(tmp_path / "run"), steps=1, samples=0, data=DataConfig(system=said))
    adapter = str(deltaw.train(model, tmp_path / "d.jsonl", config, progress=False).adapter)
    assert main(["export", adapter, "-o", str(tmp_path / "out"), "--type", "f16"]) == 0
    assert (tmp_path / "out" / "Modelfile").read_text().endswith(f'SYSTEM """{said}"""\n')
    capsys.readouterr()
    assert main(["merge", str(model), adapter, "-o", str(tmp_path / "merged"), "--check", "off"]) == 0
    assert main(["convert", adapter, "-o", str(tmp_path / "a.gguf")]) == 0
    assert capsys.readouterr().out.count(f"It was trained with the system message {said!r}") == 2


def test_llama_3s_scaling_is_a_tensor_of_factors(tmp_path: Path) -> None:
    done = export_gguf(written(tmp_path / "m", rope_parameters=LLAMA3), tmp_path / "out", kind="f32")
    factors = next(t for t in gguf.GGUFReader(done.file).tensors if t.name == "rope_freqs.weight").data
    config = LlamaConfig(**SIZES, rope_parameters=LLAMA3)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / 5e5 ** (torch.arange(0, 16, 2).float() / 16)
    torch.testing.assert_close(plain / torch.from_numpy(factors.copy()), scaled, rtol=1e-5, atol=0)
    assert len({round(float(f), 3) for f in factors}) > 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(change: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=why):
        export_gguf(written(tmp_path / "m", **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_architectures_and_tokenizers_are_refused(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(FileError, match="'gpt2'; GGUF files are written for llama"):
        export_gguf(tmp_path / "gpt2", tmp_path / "out")
    model = written(tmp_path / "m")
    settings = json.loads((model / "tokenizer.json").read_text())
    settings["pre_tokenizer"] = {"type": "Whitespace"}
    (model / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(FileError, match="splits texts in a way"):
        export_gguf(model, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpt2", "m"]


def test_rows_without_whole_blocks_stay_in_f16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(CHATML)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES | {"intermediate_size": 56})).save_pretrained(
        tmp_path / "m"
    )
    tokenizer.save_pretrained(tmp_path / "m")
    done = export_gguf(tmp_path / "m", tmp_path / "out")
    assert done.kept == [f"blk.{i}.ffn_down.weight" for i in (0, 1)]


def test_an_adapter_is_merged_and_exported_by_the_command(tmp_path: Path, run: Run) -> None:  # noqa: F811
    write_chat_model(tmp_path / "model")
    model = deltaw.attach(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), deltaw.LoRA(rank=2))
    adapter = deltaw.save(fill(model), tmp_path / "adapter")
    done = run("export", adapter, "-o", tmp_path / "out", "--type", "f32")
    assert done.returncode == 0, done.stderr
    assert "GGUF model" in done.stdout and "ollama create" in done.stdout
    deltaw.merge(model)
    with torch.no_grad():
        expected = model.eval()(torch.arange(5, 60).view(1, -1)).logits
    assert torch.equal(logits(tmp_path / "out", gguf_file=NAME), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model", "out"]
    assert run("export", adapter, "-o", tmp_path / "out").returncode == 2
    assert run("export", tmp_path / "model", "-o", tmp_path / "out", "--overwrite", "--type", "f16").returncode == 0
    assert (
        run("export", tmp_path / "nothing", "-o", tmp_path / "out2").returncode != 0
        and not (tmp_path / "out2").exists()
    )


@pytest.mark.parametrize("case", ["architecture", "whole module", "a file's name", "no model"])
def test_what_cannot_be_exported_is_said_before_and_by_the_bases_name(case: str, tmp_path: Path, run: Run) -> None:  # noqa: F811
    """It was merged first, and the message named the merge's folder, which is gone; of a whole module nothing helped."""
    folder = written(tmp_path / "model")
    if case == "architecture":
        tiny_gpt2().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    whole = "norm" if case == "whole module" else ""
    deltaw.save(fill(deltaw.attach(model, deltaw.LoRA(rank=2, whole=whole))), tmp_path / "a")
    out = tmp_path / ("out.gguf" if case == "a file's name" else "out")
    done = run("export", tmp_path / ("nothing" if case == "no model" else "a"), "-o", out)
    said = {
        "architecture": f"{folder} is a 'gpt2'", "whole module": f"deltaw merge {folder} {tmp_path / 'a'} -o MERGED",
        "a file's name": "it is a folder", "no model": f"There is no model at {tmp_path / 'nothing'}",
    }  # fmt: skip
    assert done.returncode in (2, 5) and said[case] in done.stderr.replace("\n", " "), done.stderr
    assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_a_runs_folder_is_told_where_its_adapter_is(tmp_path: Path, run: Run) -> None:  # noqa: F811
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text("{}")
    done = run("export", tmp_path / "run", "-o", tmp_path / "out")
    assert done.returncode == 5 and f"Adapters are in {tmp_path / 'run' / 'adapter'}" in done.stderr.replace("\n", " ")
