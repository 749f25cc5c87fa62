"""Names that torch.compile, FSDP, activation checkpointing, DDP and DeepSpeed put into keys."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM

from deltaw import IA3, Bottleneck, LoRA, attach, detach, load, merge_files, save
from deltaw.errors import FileError
from deltaw.layers.names import found_as, plain_names, unwrapped, unwrapped_pattern, without_peft_prefix
from tests.conftest import fill, tiny_gpt2, tiny_llama

# What stands before a key, after PEFT's prefix, and in place of ".self_attn." in it
FORMS = {
    "compiled": ("", "_orig_mod.", None),
    "ddp": ("module.", "", None),
    "ddp inside": ("", "module.", None),
    "ddp of compiled": ("module._orig_mod.", "", None),
    "fsdp": ("_fsdp_wrapped_module.", "_fsdp_wrapped_module.", "._fsdp_wrapped_module.self_attn._fsdp_wrapped_module."),
    "checkpointed layers": ("", "", "._checkpoint_wrapped_module.self_attn."),
    "all of them": ("module.module._orig_mod.", "module._orig_mod.", "._checkpoint_wrapped_module._fsdp_wrapped_module.self_attn."),
}  # fmt: skip


def rewritten(folder: Path, form: str, config: dict[str, Any] | None = None) -> None:
    """Give an adapter's file, without our metadata, the keys that a wrapped model would have given it."""
    before, after, inside = FORMS[form]
    path = folder / "adapter_model.safetensors"
    prefix = "base_model.model."
    tensors = {
        f"{before}{prefix}{after}"
        + (
            key.removeprefix(prefix) if inside is None else key.removeprefix(prefix).replace(".self_attn.", inside)
        ): value
        for key, value in load_file(path).items()
    }
    save_file(tensors, path)


@pytest.mark.parametrize("form", list(FORMS))
def test_what_wrappers_put_into_keys_is_left_out(
    form: str, ids: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(1)
    model = tiny_llama(tied=False).eval()
    model.save_pretrained(tmp_path / "base")
    save(fill(attach(model, LoRA(rank=3, alpha=7, targets="qv", whole="norm,lm_head"))), tmp_path / "a")
    expected = model(ids).logits
    rewritten(tmp_path / "a", form)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    load(again, tmp_path / "a")
    assert torch.equal(again(ids).logits, expected)
    assert sum("Names of wrappers" in line for line in caplog.messages) == 1
    save(again, tmp_path / "b")
    assert not [k for k in load_file(tmp_path / "b" / "adapter_model.safetensors") if "module" in k or "_orig_mod" in k]


@pytest.mark.parametrize("form", list(FORMS))
def test_a_merge_on_disk_leaves_them_out_too(form: str, ids: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = tiny_llama().eval()
    model.save_pretrained(tmp_path / "base")
    save(fill(attach(model, LoRA(rank=3, alpha=7, targets="qv"))), tmp_path / "a")
    expected = model(ids).logits
    rewritten(tmp_path / "a", form)
    merge_files(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


class WithModule(nn.Module):
    """A base that has a child of the name that DDP gives its own, beside one that is called as what is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.ModuleDict({"q": nn.Linear(6, 5)})
        self.q = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(self.module["q"](x))


def test_a_module_that_is_really_called_module_keeps_its_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = WithModule(), torch.randn(3, 6)
    save(fill(attach(copy.deepcopy(model), LoRA(rank=2, alpha=5, targets=["module.q", "q"]))), tmp_path / "a")
    load(model, tmp_path / "a")
    expected = model(x)
    detach(model)
    rewritten(tmp_path / "a", "all of them")
    load(model, tmp_path / "a")
    assert torch.equal(model(x), expected)


def test_two_names_of_one_layer_are_refused(tmp_path: Path) -> None:
    model = tiny_llama(layers=1)
    save(fill(attach(model, LoRA(rank=2, alpha=5, targets="qv"))), tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    detach(model)
    again = {k.replace("model.layers", "module.model.layers"): t + 1 for k, t in tensors.items()}
    save_file(tensors | again, path)
    with pytest.raises(FileError, match=r"'module\.model\.layers\.0.*are 'model\.layers\.0"):
        load(model, tmp_path / "a")
    save_file(tensors | {f"module.{k}": t + 1 for k, t in tensors.items()}, path)
    with pytest.raises(FileError, match=r"'module\.base_model.*are the same tensor's names"):
        load(model, tmp_path / "a")


class DeepSpeedEngine(nn.Module):
    """As DeepSpeed's is built: the model is its child `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def each_layer(model: Any, wrap: Any) -> Any:
    body = model.model
    for i, layer in enumerate(body.layers):
        body.layers[i] = wrap(layer)
    return model


WRAPPED = {
    "compiled layers": lambda m: each_layer(m, lambda layer: torch.compile(layer, backend="eager")),
    "checkpointed layers": lambda m: each_layer(m, checkpoint_wrapper),
    "both": lambda m: torch.compile(each_layer(m, checkpoint_wrapper), backend="eager"),
    "deepspeed": DeepSpeedEngine,
}


@pytest.mark.parametrize(
    "wrap", [pytest.param(w, marks=pytest.mark.slow if w in ("compiled layers", "both") else ()) for w in WRAPPED]
)
@pytest.mark.parametrize(
    "method", [LoRA(rank=3, alpha=7, targets="qv", whole="norm"), IA3(), Bottleneck(size=4)], ids=["lora", "ia3", "bottleneck"]
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_files_of_wrapped_models_are_those_of_plain_ones(wrap: str, method: Any, ids: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(1)
    plain = tiny_llama().eval()
    wrapped = WRAPPED[wrap](copy.deepcopy(plain))
    save(fill(attach(wrapped, method)), tmp_path / "a")
    text = (tmp_path / "a" / "adapter_config.json").read_text()
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert not any(part in key for key in [*keys, text] for part in ("_orig_mod", "wrapped_module"))
    load(plain, tmp_path / "a")
    inner = wrapped.module if wrap == "deepspeed" else wrapped
    assert torch.equal(plain(ids).logits, inner(ids).logits)
    save(plain, tmp_path / "b")
    detach(wrapped)
    load(wrapped, tmp_path / "b")
    assert torch.equal(inner(ids).logits, plain(ids).logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_pefts_file_of_a_compiled_model(ids: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(1)
    plain = tiny_gpt2().eval()
    made = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["c_attn"], modules_to_save=["ln_f"], fan_in_fan_out=True)
    theirs = peft.get_peft_model(torch.compile(copy.deepcopy(plain), backend="eager"), made)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    theirs.eval().save_pretrained(tmp_path / "a")
    assert any("_orig_mod" in key for key in load_file(tmp_path / "a" / "adapter_model.safetensors"))
    load(plain, tmp_path / "a")
    torch.testing.assert_close(plain(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_names() -> None:
    assert without_peft_prefix("module.base_model._orig_mod.model.h.q") == "h.q"
    assert without_peft_prefix("base_model.h.q") == "base_model.h.q"
    assert (
        unwrapped("a._orig_mod.b._fsdp_wrapped_module.c") == "a.b.c"
        and unwrapped("a._orig_modern.b") == "a._orig_modern.b"
    )
    assert unwrapped_pattern(r"^a\._orig_mod\.b") == r"^a\.b" and json.loads(json.dumps(unwrapped_pattern("x"))) == "x"
    known = ["a._orig_mod.b", "module.c", "d"]
    plain = plain_names(known)
    assert found_as("a.b", known, plain) == "a._orig_mod.b" == found_as("module.a.b", known, plain)
    assert found_as("module.c", known, plain) == "module.c" == found_as("module.module.c", known, plain)
    assert found_as("module.d", known, plain) == "d" and found_as("e", known, plain) is None
