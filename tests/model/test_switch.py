"""Which adapter computes: for a model, for a thread, for each row of a batch (invariant 8)."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GenerationConfig,
    MusicgenConfig,
    MusicgenForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from deltaw import LoRA, adapters, attach, detach, merge, parameters, route, unmerge, use, using
from deltaw.errors import AdapterError, MergeError
from deltaw.model.summary import updates
from tests.conftest import fill, tiny_llama

RANKS = {"a": 3, "b": 3, "c": 5, "d": 1}


@pytest.fixture
def many(tiny: Any) -> Any:
    """A tiny model with four adapters of three ranks; d has the attention's layers only."""
    for i, (name, rank) in enumerate(RANKS.items()):
        targets = "attention" if name == "d" else "all-linear"
        attach(tiny, LoRA(rank=rank, alpha=1.5 * rank, targets=targets), name=name)
        fill(tiny, name, seed=10 + i)
        for parameter in parameters(tiny, name):
            parameter.requires_grad_(False)
    use(tiny, None)
    return tiny


def alone(model: Any, ids: torch.Tensor, names: Any) -> torch.Tensor:
    """Each row by itself through its own adapter."""
    rows = []
    for row, name in zip(ids, names, strict=True):
        with using(model, name):
            rows.append(model(row[None]).logits)
    return torch.cat(rows)


def batch(n: int) -> torch.Tensor:
    return torch.randint(3, 96, (n, 9), generator=torch.Generator().manual_seed(2))


MIXES = [
    ["a", "b", "c", "d"],  # each once
    ["c", None, "a", "d", "a", "b", None, "a"],  # out of order, shared, the base between
    ["a", "b", "a", "b"],
    ["a"] * 3,
    [None, "d"],
    [None, None],
]


@pytest.mark.parametrize("names", MIXES, ids=lambda names: "".join(n or "-" for n in names))
@torch.no_grad()
def test_mixed_rows_are_each_row_alone(many: Any, names: list[str | None]) -> None:
    ids = batch(len(names))
    expected = alone(many, ids, names)
    with route(many, names):
        for _ in range(2):  # stacked, then from what was kept
            torch.testing.assert_close(many(ids).logits, expected, atol=1e-5, rtol=1e-5)
    plain = alone(many, ids, [None] * len(names))
    torch.testing.assert_close(many(ids).logits, plain, atol=1e-5, rtol=1e-5)
    assert any(names) != torch.allclose(plain, expected, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_mixed_rows_are_each_row_alone_in_other_precisions(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = tiny_llama().to(dtype).eval()
    for i, name in enumerate("ab"):
        fill(attach(model, LoRA(rank=4, alpha=6), name=name), name, seed=i)
    ids, names = batch(3), ["b", "a", None]
    expected = alone(model, ids, names)
    with route(model, names):
        found = model(ids).logits
    assert found.dtype == dtype
    tolerance = 0.05 * float(expected.abs().max()) if dtype == torch.bfloat16 else 1e-10
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_gradients_reach_each_rows_own_adapter(many: Any) -> None:
    names = ["c", "a", "a", None, "b"]
    ids = batch(5)
    for name in RANKS:
        for parameter in parameters(many, name):
            parameter.requires_grad_(True)
    weights = torch.linspace(0.5, 1.5, 5)
    for row, name, weight in zip(ids, names, weights, strict=True):
        if name is not None:
            with using(many, name):
                (weight * many(row[None]).logits.square().sum()).backward()
    expected = {n: [p.grad.clone() for p in parameters(many, n)] for n in "abc"}
    for name in RANKS:
        for parameter in parameters(many, name):
            parameter.grad = None
    with route(many, names):
        (weights[:, None, None] * many(ids).logits.square()).sum().backward()
    for name in "abc":
        for parameter, grad in zip(parameters(many, name), expected[name], strict=True):
            torch.testing.assert_close(parameter.grad, grad, atol=1e-3, rtol=1e-3)
    assert all(p.grad is None for p in parameters(many, "d"))


@torch.no_grad()
def test_an_adapter_that_changes_within_a_block_is_seen(many: Any) -> None:
    ids, names = batch(2), ["a", "b"]
    with route(many, names):
        before = many(ids).logits
        parameters(many, "b")[1].mul_(3.0)
        after = many(ids).logits
    torch.testing.assert_close(after, alone(many, ids, names), atol=1e-5, rtol=1e-5)
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}],
    ids=str,
)
@torch.no_grad()
def test_generate_follows_the_rows(many: Any, settings: dict[str, Any]) -> None:
    ids, names = batch(4), ["b", None, "c", "a"]
    config = GenerationConfig(max_new_tokens=7, pad_token_id=0, eos_token_id=95, **settings)
    if settings.get("do_sample"):
        config.top_k = 1  # sampling's way through the code, one possible outcome
    with route(many, names):
        found = many.generate(ids, generation_config=config)
    each = config.num_return_sequences or 1
    for i, name in enumerate(names):
        with using(many, name):
            own = many.generate(ids[i : i + 1], generation_config=config)
        width = min(own.shape[1], found.shape[1])
        assert torch.equal(found[i * each : (i + 1) * each, :width], own[:, :width])


@torch.no_grad()
def test_an_encoder_and_its_decoder_follow_the_rows() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    for i, name in enumerate("ab"):
        fill(attach(model, LoRA(rank=2), name=name), name, seed=i)
    ids, names = batch(3), ["a", "b", None]
    settings = GenerationConfig(
        max_new_tokens=5, num_beams=2, num_return_sequences=2, pad_token_id=0, decoder_start_token_id=0
    )
    with route(model, names):
        found = model.generate(ids, generation_config=settings)
    for i, name in enumerate(names):
        with using(model, name):
            own = model.generate(ids[i : i + 1], generation_config=settings)
        width = min(own.shape[1], found.shape[1])
        assert torch.equal(found[2 * i : 2 * i + 2, :width], own[:, :width])


@torch.no_grad()
def test_layers_that_see_the_time_first_follow_the_rows() -> None:
    """XLNet's: the rows of the batch are its layers' second dimension."""
    model = XLNetLMHeadModel(XLNetConfig(vocab_size=96, d_model=32, n_layer=1, n_head=4, d_inner=48)).eval()
    for seed, name in enumerate("ab"):
        fill(attach(model, LoRA(rank=2), name=name), name, seed=seed)
    ids, names = batch(3), ["b", None, "a"]
    with route(model, names):
        found = model(ids).logits
    for row, name in enumerate(names):
        with using(model, name):
            torch.testing.assert_close(found[row], model(ids).logits[row], atol=1e-5, rtol=1e-5)


def test_what_cannot_be_routed_is_an_error_that_says_why(many: Any) -> None:
    with pytest.raises(AdapterError, match=r"(?s)'aa'.*'zz'.*Attached: a, b, c, d"), route(many, ["a", "aa", "zz"]):
        pass
    with pytest.raises(AdapterError, match="one name for each row"), route(many, "ab"):
        pass
    with pytest.raises(AdapterError, match="there is none"), route(many, []):
        pass
    with pytest.raises(AdapterError, match="names 2 rows, but a layer's input is"), route(many, ["a", "b"]):
        many(batch(3))
    with pytest.raises(AdapterError, match="name the adapter"), route(many, ["a", "b"]):
        parameters(many)
    assert adapters(many).active is None
    with pytest.raises(AdapterError, match="DataParallel"), using(nn.DataParallel(many), "a"):
        pass


def test_an_adapter_in_an_open_block_cannot_be_detached_or_merged(many: Any) -> None:
    with route(many, ["a", "b"]):
        with pytest.raises(AdapterError, match="in use"):
            detach(many, "a")
        with pytest.raises(AdapterError, match="in use"):
            detach(many)
        with pytest.raises(MergeError, match="in use"):
            merge(many, "c")
        detach(many, "d")
    merge(many, "a")
    with pytest.raises(AdapterError, match="merged"), route(many, ["a", "b"]):
        pass
    with route(many, [None, None]):
        pass
    unmerge(many)
    detach(many)


def test_blocks_nest_and_use_holds_within_its_block(many: Any) -> None:
    use(many, "c")
    with using(many, "a"):
        assert adapters(many).active == "a"
        with route(many, ["a", "b"]):
            assert adapters(many).active is None
            with using(many, None):
                assert adapters(many).active is None
        use(many, "b")
        assert adapters(many).active == "b"
    assert adapters(many).active == "c"
    with pytest.raises(ValueError, match="on purpose"), using(many, "a"):
        raise ValueError("on purpose")
    assert adapters(many).active == "c"


@torch.no_grad()
def test_threads_have_routes_of_their_own(many: Any) -> None:
    ids = batch(2)
    choices: list[list[str | None]] = [["a", "a"], ["b", "c"], [None, "d"], ["c", "b"]]
    expected = [alone(many, ids, names) for names in choices]
    use(many, "d")
    ready = threading.Barrier(len(choices))
    found: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(choices))}

    def serve(i: int) -> None:
        with torch.no_grad(), route(many, choices[i]):
            for _ in range(5):
                ready.wait(timeout=60)
                found[i].append(many(ids).logits)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(len(choices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, logits in found.items():
        assert len(logits) == 5
        for one in logits:
            torch.testing.assert_close(one, expected[i], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(many(ids).logits, alone(many, ids, ["d", "d"]), atol=1e-5, rtol=1e-5)


def test_a_switch_is_seen_in_every_thread(many: Any) -> None:
    use(many, "b")
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(adapters(many).active))
    thread.start()
    thread.join()
    assert seen == ["b"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_switches_hold_under(mode: Any, many: Any) -> None:
    ids = batch(2)
    with mode():
        use(many, "a")
        one = many(ids).logits
        with route(many, ["a", "b"]):
            mixed = many(ids).logits
        torch.testing.assert_close(mixed[0], one[0], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(mixed[1], one[1])


@pytest.mark.slow
@torch.no_grad()
def test_compiled_models_see_switches_and_rows() -> None:
    torch.manual_seed(1)
    model = tiny_llama().eval()
    for i, name in enumerate("ab"):
        fill(attach(model, LoRA(rank=3), name=name), name, seed=i)
    ids = batch(2)
    expected = {names: alone(model, ids, names) for names in (("a", "a"), ("b", "b"), ("a", "b"), (None, "a"))}
    compiled = torch.compile(model, backend="eager")
    for names, logits in expected.items():
        with route(model, names):
            torch.testing.assert_close(compiled(ids).logits, logits, atol=1e-5, rtol=1e-5)
    use(model, "b")
    torch.testing.assert_close(compiled(ids).logits, expected["b", "b"], atol=1e-5, rtol=1e-5)


def test_copies_are_in_no_block(many: Any) -> None:
    use(many, "c")
    with route(many, ["a", "b"]):
        copied = copy.deepcopy(many)
        pickled = pickle.loads(pickle.dumps(many))
    assert adapters(copied).active == adapters(pickled).active == "c"
    use(copied, "a")
    assert adapters(many).active == "c"


@torch.no_grad()
def test_unloading_frees_the_tensors(many: Any) -> None:
    with route(many, ["a", "b", "c"]):
        many(batch(3))
    gone = [weakref.ref(p) for p in parameters(many, "b")]
    detach(many, "b")
    gc.collect()
    assert all(ref() is None for ref in gone)
    assert not torch.allclose(*(alone(many, batch(1), [n]) for n in ("a", "c")))


@pytest.mark.parametrize("in_one_block", [False, True])
@pytest.mark.parametrize("change", ["fused step", "by .data", "new memory", "another tensor", "under inference mode"])
def test_rows_follow_changes_that_pytorch_does_not_count(change: str, in_one_block: bool, ids: torch.Tensor) -> None:
    torch.manual_seed(1)
    model = tiny_llama().eval()
    for seed, name in enumerate("ab"):
        fill(attach(model, LoRA(rank=2, alpha=5), name=name), name, seed=seed)
    names, own = ["a", "b", "a"], parameters(model, "a")

    def rows() -> torch.Tensor:
        with torch.no_grad(), route(model, names) if not in_one_block else contextlib.nullcontext():
            return model(ids).logits

    with route(model, names) if in_one_block else contextlib.nullcontext():
        before = rows()
        if change == "fused step":
            for parameter in own:
                parameter.requires_grad_(True).grad = torch.ones_like(parameter)
            torch.optim.AdamW(own, lr=0.1, fused=True).step()
        for update in updates(model, "a").values():
            if change == "by .data":
                update.B.data += 0.1
            if change == "new memory":
                update.B.data = update.B.detach() + 0.1
            if change == "another tensor":
                update.B = torch.nn.Parameter(update.B.detach() + 0.1)
            if change == "under inference mode":
                with torch.inference_mode():
                    update.B.add_(0.1)
        after = rows()
    assert not torch.allclose(after[0], before[0]) and torch.allclose(after[1], before[1], atol=1e-5)
    with torch.no_grad(), using(model, "a"):
        torch.testing.assert_close(after[2], model(ids).logits[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("names", [["a"], [None], ["a", "a"], [None, None], ["a", "b"], ["a", None]], ids=str)
@torch.no_grad()
def test_a_batch_of_another_number_of_rows_is_refused(names: list[str | None], many: Any) -> None:
    n = len(names)
    embedded = many.get_input_embeddings()(batch(3 * n))
    body, layer = many.base_model, many.get_submodule(next(n for n in updates(many, "a") if "mlp" in n))
    calls: list[Any] = [lambda rows=rows: many(batch(rows)) for rows in (n + 1, 2 * n, 3 * n)]
    calls += [
        lambda: many(input_ids=batch(2 * n), attention_mask=torch.ones(2 * n, 9)),
        lambda: many(inputs_embeds=embedded),
        lambda: body(batch(2 * n)),
        lambda: layer(torch.ones(2 * n, 4, 32)),
        lambda: layer(torch.ones(2 * n, 32)),
    ]
    with route(many, names):
        for call in calls:
            with pytest.raises(AdapterError, match=rf"names {n} rows?, but a layer's input is \[\d+, .*must be {n}"):
                call()
        with pytest.raises(AdapterError, match=rf"names {n} rows?, but a layer's input is \[32\]"):
            layer(torch.ones(32))
        assert many(batch(n)).logits.shape[0] == body(input_ids=batch(n))[0].shape[0] == n
        assert layer(torch.ones(n, 32)).shape[0] == n
    with using(many, names[0]):
        many(batch(3))


@torch.no_grad()
def test_rows_of_a_layer_without_a_batch_dimension_are_refused() -> None:
    model = nn.Sequential(nn.Conv1d(3, 3, 3, padding=1))
    for seed, name in enumerate("ab"):
        fill(attach(model, LoRA(rank=2, alpha=5, targets="0"), name=name), name, seed=seed)
    x = torch.randn(3, 8)  # [channels, length]
    for names in (["a", "b", None], ["a"] * 3):
        with route(model, names):
            assert model(x.expand(3, 3, 8)).shape == (3, 3, 8)
            with pytest.raises(AdapterError, match=r"names 3 rows, but a layer's input is \[3, 8\]"):
                model[0](x)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
@pytest.mark.parametrize("names", [["a", "a"], [None, None]], ids=str)
@torch.no_grad()
def test_generate_expands_rows_that_are_all_alike_too(settings: dict[str, Any], names: Any, many: Any) -> None:
    config = GenerationConfig(max_new_tokens=4, pad_token_id=0, eos_token_id=95, **settings)
    config.top_k = 1 if settings.get("do_sample") else None
    with using(many, names[0]):
        expected = many.generate(batch(2), generation_config=config)
    with route(many, names):
        assert torch.equal(many.generate(batch(2), generation_config=config), expected)
        for prompts in (1, 3, 4):  # what generate makes of a prompt may be several rows, the prompts themselves may not
            with pytest.raises(AdapterError, match="names 2 rows"):
                many.generate(batch(prompts), generation_config=config)
        with pytest.raises(AdapterError, match="names 2 rows"):
            many.generate(inputs_embeds=many.get_input_embeddings()(batch(4)), max_new_tokens=2)


@torch.no_grad()
def test_generate_of_a_model_around_the_adapted_one_expands_the_rows() -> None:
    torch.manual_seed(1)
    model = tiny_llama().eval()
    for seed, name in enumerate("ab"):
        fill(attach(model.model, LoRA(rank=2, alpha=5), name=name), name, seed=seed)
    config = GenerationConfig(max_new_tokens=5, pad_token_id=0, eos_token_id=95, num_beams=3)
    with route(model, ["b", "a"]):
        found = model.generate(batch(2), generation_config=config)
    for i, name in enumerate("ba"):
        with using(model, name):
            own = model.generate(batch(2)[i : i + 1], generation_config=config)
        width = min(own.shape[1], found.shape[1])
        assert torch.equal(found[i : i + 1, :width], own[:, :width])


@pytest.mark.parametrize("name", [1, True, ["a"], b"a"], ids=str)
def test_what_is_no_name_is_an_error_of_deltaw(name: Any, many: Any) -> None:
    """A raw TypeError of a search for near names, or of a dictionary, does not say what is wrong."""
    for call in (
        lambda: use(many, name),
        lambda: using(many, name).__enter__(),
        lambda: route(many, ["a", name]).__enter__(),
        lambda: parameters(many, name),
        lambda: merge(many, name),
    ):
        with pytest.raises(AdapterError, match="There is no adapter"):
            call()
    merge(many, "a", allow_unchanged=True)
    with pytest.raises(MergeError, match="is not merged"):
        unmerge(many, name)
    unmerge(many)
    for names in (3, None):
        with pytest.raises(AdapterError, match="one name for each row of the batch, not one"):
            route(many, names).__enter__()  # type: ignore[arg-type]


def test_rows_that_guidance_computes_twice_are_refused() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 24, "num_attention_heads": 2, "num_codebooks": 2}
    config = MusicgenConfig(
        text_encoder={"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40},
        audio_encoder={
            "model_type": "encodec", "hidden_size": 8, "num_filters": 2, "codebook_size": 32, "codebook_dim": 8,
            "upsampling_ratios": [2, 2], "target_bandwidths": [1.5], "sampling_rate": 16,
        },
        decoder={"vocab_size": 32, "pad_token_id": 31, "bos_token_id": 31, **sizes},
    )  # fmt: skip
    model = MusicgenForConditionalGeneration(config).eval()
    for name in ("a", "b"):
        attach(model, LoRA(rank=2, targets="*decoder*q_proj"), name=name)
    ids, options = torch.randint(3, 40, (2, 5)), {"max_new_tokens": 4, "do_sample": False}
    with route(model, ["a", "b"]):
        assert len(model.generate(input_ids=ids, guidance_scale=1.0, **options)) == 2
        with pytest.raises(AdapterError, match="guidance_scale=1"):
            model.generate(input_ids=ids, guidance_scale=3.0, **options)


@torch.no_grad()
def test_a_route_that_another_thread_closes_leaves_the_pass_in_progress_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    for name in ("a", "b"):
        attach(model, LoRA(rank=2, targets="0,1"), name=name)
    opened, close, closed = threading.Event(), threading.Event(), threading.Event()

    def elsewhere() -> None:
        with route(model, ["a", "b"]):
            opened.set()
            close.wait(9)
        closed.set()

    def closes(*_: object) -> None:  # PyTorch has listed the hooks of this pass by now
        close.set()
        assert closed.wait(9)

    use(model, None)
    x = torch.randn(3, 6)
    plain = model(x)
    model.register_forward_pre_hook(closes)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    assert opened.wait(9)
    assert torch.equal(model(x), plain)
    thread.join()
