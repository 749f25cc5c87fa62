"""Quantised linear layers, by the packages that make them: an update of one from attach to file and back; with real PEFT."""

import copy
import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import deltaw
from deltaw import DoRA, LoRA, attach, detach, load, merge, parameters, route, save, summary, use, using
from deltaw.errors import BaseMismatch, MergeError, TargetError
from deltaw.files.identity import base_fingerprint
from deltaw.layers.kinds import QUANTISED, kind_of, shape
from deltaw.layers.quantised import form_of
from deltaw.layers.tree import base_modules
from deltaw.methods.targets import select
from deltaw.model.summary import updates
from deltaw.training.flat import Flat
from deltaw.training.together import same_input
from tests.conftest import fill
from tests.data.conftest import CHATML, tiny_tokenizer

FORMS = ("nf4", "fp4", "int8", "torchao", "torchao dynamic")
PEFTS = ("nf4", "fp4", "int8", "torchao")
LAYER = "model.layers.0.mlp.up_proj"
METHOD = LoRA(rank=4, alpha=6)


def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the dev extra has it)")


def torchao() -> Any:
    pytest.importorskip("torchao", reason="torchao is not installed (the dev extra has it)")
    return importlib.import_module("torchao.quantization")


def quantise(model: Any, form: str) -> Any:
    """The model's dense layers but its head quantised, frozen and in evaluation."""
    if form.startswith("torchao"):
        ao = torchao()
        config = ao.Int8WeightOnlyConfig() if form == "torchao" else ao.Int8DynamicActivationInt8WeightConfig()
        ao.quantize_(model, config, lambda layer, name: isinstance(layer, nn.Linear) and name != "lm_head")
        return model.eval().requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            model.set_submodule(name, packed(layer, form))
    return model.eval().requires_grad_(False)


def packed(layer: nn.Linear, form: str, **settings: Any) -> Any:
    own = bitsandbytes().nn
    args = layer.in_features, layer.out_features, layer.bias is not None
    made = own.Linear8bitLt(*args, has_fp16_weights=False) if form == "int8" else None
    made = made or own.Linear4bit(*args, quant_type=form, **settings)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def plain(*, vocabulary: int = 96, **settings: Any) -> Any:
    """bitsandbytes wants multiples of 64 where it computes in 4 bits."""
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=vocabulary, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, **settings,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(form: str) -> Any:
    return quantise(plain(), form)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits  # type: ignore[no-any-return]


def contents(model: Any) -> list[torch.Tensor]:
    """Return what the quantised layers hold."""
    return [t.clone() for _, m in base_modules(model) if (form := form_of(m)) for t in form.content(m)]


def test_a_quantised_layers_life(model: Any, form: str, ids: torch.Tensor, tmp_path: Path) -> None:
    base, was, print_ = logits(model, ids), contents(model), base_fingerprint(model)
    before = [(n, type(m), id(m)) for n, m in model.named_modules()]
    attach(model, METHOD)
    assert torch.equal(logits(model, ids), base)
    model.train()
    model(ids).logits.square().mean().backward()
    assert all(u.B.grad.any() for u in updates(model).values())
    fill(model.eval())
    branch = logits(model, ids)
    assert (branch - base).abs().max() > 1e-2
    assert deltaw.delta(model, LAYER).shape == (128, 64)
    save(model, tmp_path / "a")
    use(model, None)
    assert torch.equal(logits(model, ids), base)
    detach(model)
    assert [(n, type(m), id(m)) for n, m in model.named_modules()] == before and torch.equal(logits(model, ids), base)
    load(model, tmp_path / "a")
    assert torch.equal(logits(model, ids), branch)
    assert (
        all(torch.equal(a, b) for a, b in zip(contents(model), was, strict=True)) and base_fingerprint(model) == print_
    )


@pytest.mark.parametrize("method", [METHOD, DoRA(rank=4, alpha=6), LoRA(rank=4, alpha=6, init="pissa")])
def test_an_update_is_one_of_the_weight_that_the_bits_stand_for(
    model: Any, form: str, method: LoRA, ids: torch.Tensor
) -> None:
    if "dynamic" in form:
        pytest.skip("its input is rounded too")
    twin = plain().requires_grad_(False)
    for name, layer in twin.named_modules():
        if (kind := kind_of(model.get_submodule(name))) is QUANTISED:
            layer.weight = nn.Parameter(kind.W0(model.get_submodule(name)), requires_grad=False)
    for each in (model, twin):
        torch.manual_seed(0)
        attach(each, method)
        each.train()  # in which bitsandbytes computes in fp32 here
        with torch.no_grad():
            for i, p in enumerate(parameters(each)):
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.05)
    x = [each.get_input_embeddings()(ids).requires_grad_() for each in (model, twin)]
    outs = [each(inputs_embeds=own).logits for each, own in zip((model, twin), x, strict=True)]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-3, atol=1e-4)
    for out in outs:
        out.square().sum().backward()
    torch.testing.assert_close(x[0].grad, x[1].grad, rtol=1e-3, atol=1e-3)
    for own, theirs in zip(parameters(model), parameters(twin), strict=True):
        torch.testing.assert_close(own.grad, theirs.grad, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("trained", [False, True])
def test_gradients_go_through_after_an_evaluation(model: Any, trained: bool, ids: torch.Tensor) -> None:
    """On some CPUs an evaluation leaves bitsandbytes' 4 bits without gradients, and torchao's rounded inputs have none."""
    fill(attach(model, METHOD))
    logits(model, ids)
    model.train(trained)
    model(ids).logits.square().mean().backward()
    assert all(p.grad.any() for p in parameters(model))
    layer = model.get_submodule(LAYER)
    x = torch.randn(3, 64, requires_grad=True)
    out = layer(x)
    weight = QUANTISED.W0(layer) + deltaw.delta(model, LAYER)
    g = torch.randn(out.shape)
    out.backward(g)
    torch.testing.assert_close(x.grad, g @ weight, rtol=1e-3, atol=1e-3)


def test_each_rows_output_is_its_adapters_alone(model: Any, ids: torch.Tensor) -> None:
    """Layer by layer, on the inputs of one pass: a package's kernel rounds a layer's input (bitsandbytes' 4 bits on a CPU with
    AVX512-BF16 to bfloat16, torchao's dynamic ones to int8), so a last bit of fp32 that two orders of summation differ in becomes a
    step of that rounding in the next layer. No tolerance for a whole model follows from that; for a layer, fp32's own does."""
    for i, name in enumerate("ab"):
        fill(attach(model, METHOD, name=name), name, seed=i)
    passed: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, out, name=name: passed.update({name: (inputs[0], out)})
        )
        for name in updates(model)
    ]
    with torch.no_grad(), route(model, ["b", None, "a"]):
        model(ids)
    for hook in hooks:
        hook.remove()
    assert len(passed) == 14
    for row, name in enumerate(["b", None, "a"]):
        with torch.no_grad(), using(model, name):
            for layer, (x, out) in passed.items():
                torch.testing.assert_close(out[row], model.get_submodule(layer)(x[row : row + 1])[0])


def test_all_rows_adapters_learn_in_training_and_in_evaluation(model: Any, ids: torch.Tensor) -> None:
    for i, name in enumerate("ab"):
        fill(attach(model, METHOD, name=name), name, seed=i)
    for p in (*parameters(model, "a"), *parameters(model, "b")):
        p.requires_grad_(True)
    for trained in (True, False):
        model.train(trained)
        with route(model, ["b", None, "a"]):
            model(ids).logits.square().mean().backward()
    assert all(p.grad.any() for name in "ab" for p in parameters(model, name))


def test_targets_see_its_own_shape(model: Any) -> None:
    found = select(model, "all-linear", 4)
    assert len(found.ranks) == 14 and set(found.left_out) == {"model.embed_tokens", "lm_head"}
    assert shape(model.get_submodule(LAYER)) == (128, 64)
    assert len(select(model, "qv", 4).ranks) == 4
    with pytest.raises(TargetError, match=r"rank 65 is larger than min\(d, k\) = 64"):
        attach(model, LoRA(rank=65, targets="up"))
    attach(model, LoRA(rank=2, targets="up[0:32]"))
    assert updates(model)[LAYER].B.shape == (128, 2)


def test_sizes_are_those_of_the_weight_and_of_its_bits(model: Any, form: str) -> None:
    own, usual = summary(attach(model, METHOD)), summary(attach(plain(), METHOD))
    assert own.base_parameters == usual.base_parameters
    assert own.adapters["default"].share == usual.adapters["default"].share
    dense, rest = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128), 2 * 96 * 64 + 5 * 64
    width = 0.5 if form.endswith("4") else 1
    assert width * dense < own.base_bytes - 4 * rest < width * 1.2 * dense


def test_a_merge_is_refused_and_says_what_to_do(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    fill(attach(model, METHOD))
    save(model, tmp_path / "a")
    was, branch = contents(model), logits(model, ids)
    with pytest.raises(MergeError, match=r"11 more are quantised .*\n.*--any-base"):
        merge(model)
    assert torch.equal(logits(model, ids), branch)
    assert all(torch.equal(a, b) for a, b in zip(contents(model), was, strict=True))
    # What it says
    plain().save_pretrained(tmp_path / "base")
    with pytest.raises(BaseMismatch):
        deltaw.merge_files(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    deltaw.merge_files(tmp_path / "base", tmp_path / "a", tmp_path / "merged", check_base=False)
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    merge(model := _with(plain(), tmp_path / "a"))
    assert torch.equal(logits(whole, ids), logits(model, ids))


def _with(model: Any, path: Path) -> Any:
    load(model, path, check_base=False)
    return model


def test_another_base_is_noticed(model: Any, form: str, tmp_path: Path) -> None:
    save(attach(model, METHOD), tmp_path / "a")
    load(quantise(plain(), form), tmp_path / "a")
    other = plain()
    with torch.no_grad():
        other.get_submodule(LAYER).weight.neg_()
    with pytest.raises(BaseMismatch):
        load(quantise(other, form), tmp_path / "a")
    with pytest.raises(BaseMismatch):
        load(plain(), tmp_path / "a")


def test_a_training_step_in_flat_buffers_is_that_of_the_layers_one_by_one(
    model: Any, form: str, ids: torch.Tensor
) -> None:
    within = {"rtol": None, "atol": None} if "dynamic" not in form else {"rtol": 0, "atol": 1e-3}  # as of rows above
    fill(attach(model, METHOD)).train()
    adapted = updates(model)

    def measure() -> torch.Tensor:
        return model(ids).logits.square().mean()  # type: ignore[no-any-return]

    expected = measure()
    gradients = torch.autograd.grad(expected, parameters(model))
    with torch.no_grad():
        groups = same_input(adapted, measure)
    with Flat({name: model.get_submodule(name) for name in adapted}, adapted, groups) as flat:
        loss = measure()
        torch.testing.assert_close(loss, expected, **within)
        loss.backward()
        flat.add_gradients()
        for parameter, gradient in zip(parameters(model), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, **within)


def test_a_run_learns_and_its_adapter_is_good(form: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML)

    def make() -> Any:
        return quantise(plain(vocabulary=len(tokenizer), pad_token_id=None), form)

    model, words = make(), ["red", "blue", "green", "white"]
    records = [{"prompt": f"{a} and {b}?", "completion": f" {b} {a}"} for a in words for b in words if a != b]
    config = deltaw.TrainConfig(out=str(tmp_path / "run"), lr=0.02, epochs=4, batch=4, samples=0, seed=4)
    was = contents(model)
    result = deltaw.train(model, records, config, method=METHOD, tokenizer=tokenizer)
    assert result.state.last_loss < result.state.first_loss - 0.1
    assert all(torch.equal(a, b) for a, b in zip(contents(model), was, strict=True))
    twin = make()
    load(twin, result.folder / "adapter")
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(twin, ids), logits(model.eval(), ids))


def test_copies_are_their_own(model: Any, ids: torch.Tensor) -> None:
    fill(attach(model, METHOD))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids), logits(model, ids))
    fill(twin, seed=9)
    assert not torch.equal(logits(twin, ids), logits(model, ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", PEFTS, indirect=False)
def test_real_peft_and_we_agree(form: str, dtype: torch.dtype, ids: torch.Tensor, tmp_path: Path) -> None:
    import peft
    from transformers import BitsAndBytesConfig, TorchAoConfig

    settings: dict[str, Callable[[], Any]] = {
        "nf4": lambda: BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        ),
        "fp4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=dtype),
        "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "torchao": lambda: TorchAoConfig(torchao().Int8WeightOnlyConfig()),
    }
    if form != "torchao":
        bitsandbytes()
    plain().save_pretrained(tmp_path / "base")

    def opened() -> Any:
        own = settings[form]()
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=own, dtype=dtype).eval()

    # PEFT computes A and B in fp32 beside a bfloat16 base; the package's products in 4 bits round to bfloat16
    within = {"rtol": 0.0, "atol": 1e-3 if dtype == torch.float32 else 3e-2}
    model = fill(attach(opened(), METHOD), size=0.1)
    save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(opened(), tmp_path / "ours")
    assert type(theirs.base_model.model.get_submodule(LAYER)).__module__.endswith(("lora.bnb", "lora.torchao"))
    torch.testing.assert_close(logits(theirs, ids), logits(model, ids), **within)

    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
    theirs = peft.get_peft_model(opened(), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    load(model, tmp_path / "theirs", name="theirs")
    torch.testing.assert_close(logits(model, ids), logits(theirs, ids), **within)


def test_what_has_no_bits_yet_is_refused() -> None:
    own = bitsandbytes().nn
    for layer, why in (
        (own.Linear4bit(64, 64), "its weight has no 4 bits yet"),
        (own.Linear8bitLt(64, 64, has_fp16_weights=False), "its weight has no 8 bits yet"),
        (own.Linear8bitLt(64, 64), "it keeps its weight in 16 bits"),
    ):
        with pytest.raises(TargetError, match=why):
            attach(nn.Sequential(layer), METHOD)


def test_layers_that_stop_gradients_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = quantise(plain(), "torchao dynamic")
    with caplog.at_level(logging.WARNING, logger="deltaw"):
        attach(copy.deepcopy(model), METHOD)
        assert not caplog.records
        attach(model, LoRA(rank=2, targets="qv"))
    assert "10 quantised layers have no low-rank update (model.layers.0.self_attn.k_proj, for example)" in caplog.text


def test_codes_that_a_cpu_has_reordered_are_the_same_codes() -> None:
    """What bitsandbytes does in evaluation, on CPUs that multiply bfloat16, is no other base."""
    from deltaw.layers.quantised import BitsAndBytes4, _is_reordered

    form = BitsAndBytes4()

    linear = nn.Linear(64, 96)
    for double in (True, False):
        layer = packed(linear, "nf4", compress_statistics=double).eval().requires_grad_(False)
        if not layer.support_avx512bf16_for_cpu:
            pytest.skip("this CPU has no bfloat16 products")
        was, W0 = form.content(layer), form.dense(layer, torch.float32)
        layer(torch.randn(2, 64))
        assert _is_reordered(layer)
        assert all(torch.equal(a, b) for a, b in zip(form.content(layer), was, strict=True))
        torch.testing.assert_close(form.dense(layer, torch.float32), W0, rtol=4e-3, atol=0)


@pytest.mark.slow
def test_no_package_is_imported_for_a_model_without_such_layers() -> None:
    import subprocess
    import sys

    code = (
        "import sys, torch, deltaw\n"
        "from deltaw.layers.kinds import kind_of\n"
        "before = set(sys.modules)\n"
        "deltaw.attach(torch.nn.Sequential(torch.nn.Linear(6, 4)), deltaw.LoRA(rank=2, targets='0'))\n"
        "assert not {'bitsandbytes', 'torchao'} & (set(sys.modules) - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Reads(nn.Module):
    """Falcon-Mamba does so with its dt_proj."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inside = layer

    def forward(self, x: torch.Tensor) -> Any:
        return self.inside(x) - self.inside.bias


@pytest.mark.parametrize("form", ["nf4", "fp4", "int8"])
def test_a_module_that_reads_beside_calling(form: str) -> None:
    model, x = nn.Sequential(Reads(packed(nn.Linear(64, 64), form))), torch.randn(2, 64)
    base = model(x)
    fill(attach(model, DoRA(rank=2, alpha=3, targets="inside")))
    assert not torch.allclose(model(x), base, atol=1e-2)
    detach(model)
    assert torch.equal(model(x), base)
