"""A pass goes through one choice, taken as it begins; so do a call of generate, and what a backward pass computes again."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig

from deltaw import LoRA, adapters, attach, detach, load, merge, parameters, route, save, unmerge, use, using
from deltaw.errors import AdapterError, MergeError
from deltaw.layers.tree import to_train
from deltaw.model.ends import teach
from deltaw.model.record import record_of
from tests.conftest import assert_same, fill, snapshot, tiny_llama


@pytest.fixture
def model() -> Any:
    """A tiny model with adapters a and b, the base active."""
    torch.manual_seed(1)
    model = tiny_llama().eval()
    for seed, name in enumerate("ab"):
        fill(attach(model, LoRA(rank=2 + seed, alpha=5), name=name), name, seed=seed)
    use(model, None)
    return model


@pytest.fixture
def expected(model: Any, ids: torch.Tensor) -> dict[str | None, torch.Tensor]:
    found = {}
    for name in ("a", "b", None):
        with using(model, name), torch.no_grad():
            found[name] = model(ids).logits
    return found


def elsewhere(act: Callable[[], Any]) -> Any:
    """Call it in another thread, for what it gives or raises."""
    seen: list[Any] = []

    def run() -> None:
        try:
            seen.append(act())
        except Exception as error:
            seen.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return seen[0]


@pytest.mark.parametrize("how", ["active", "block", "body alone"])
@torch.no_grad()
def test_a_switch_in_mid_pass_is_for_the_next_one(how: str, model: Any, ids: torch.Tensor, expected: Any) -> None:
    called = model.model if how == "body alone" else model
    use(model, "a")
    first = called(ids)[0]
    switched = model.model.layers[0].register_forward_hook(lambda *_: elsewhere(lambda: use(model, "b")))
    if how == "block":
        with using(model, None):
            assert torch.equal(model(ids).logits, expected[None])
    else:
        assert torch.equal(called(ids)[0], first)
    switched.remove()
    assert adapters(model).active == "b"
    assert torch.equal(model(ids).logits, expected["b"])


@torch.no_grad()
def test_a_block_that_is_opened_in_a_pass_holds_for_what_is_in_it(model: Any, ids: torch.Tensor, expected: Any) -> None:
    seen: list[torch.Tensor] = []

    def reference(*_: Any) -> None:
        if not seen:
            seen.append(torch.zeros(()))
            with using(model, None):
                seen.append(model(ids).logits)
                seen.append(model.model.layers[0].mlp.up_proj(torch.ones(1, 1, 32)))
            seen.append(model(ids).logits)

    model.model.layers[0].register_forward_hook(reference)
    with using(model, "b"):
        assert torch.equal(model(ids).logits, expected["b"])
    assert torch.equal(seen[1], expected[None]) and torch.equal(seen[3], expected["b"])
    assert torch.equal(seen[2], model.model.layers[0].mlp.up_proj(torch.ones(1, 1, 32)))


@torch.no_grad()
def test_requests_of_one_event_loop_go_through_their_own_adapters(model: Any, ids: torch.Tensor, expected: Any) -> None:
    async def request(name: str | None) -> None:
        with using(model, name):
            for _ in range(3):
                await asyncio.sleep(0)
                assert torch.equal(model(ids).logits, expected[name])

    async def rows() -> None:
        with route(model, ["b", None, "a"]):
            await asyncio.sleep(0)
            mixed = model(ids).logits
        for row, name in enumerate(["b", None, "a"]):
            torch.testing.assert_close(mixed[row], expected[name][row], rtol=1e-5, atol=1e-5)

    async def main() -> None:
        await asyncio.gather(request("a"), rows(), request("b"), request(None))

    asyncio.run(main())

    def stream(name: str) -> Iterator[torch.Tensor]:
        with using(model, name):
            while True:
                yield model(ids).logits

    a, b = stream("a"), stream("b")
    for _ in range(2):
        assert torch.equal(next(a), expected["a"]) and torch.equal(model(ids).logits, expected[None])
        assert torch.equal(next(b), expected["b"])
    a.close()
    b.close()
    detach(model, "a")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("later", ["block closed", "switched", "another block", "two passes"])
def test_what_is_computed_again_goes_through_what_its_forward_went_through(
    later: str, reentrant: bool, ids: torch.Tensor
) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor | None]:
        torch.manual_seed(1)
        model = tiny_llama().train()
        for seed, name in enumerate("ab"):
            fill(attach(model, LoRA(rank=2, alpha=5), name=name), name, seed=seed)
            for parameter in parameters(model, name):
                parameter.requires_grad_(True)
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        use(model, "b" if later == "block closed" else "a")
        if later == "block closed":
            with using(model, "a"):
                loss = model(ids, labels=ids).loss
        else:
            loss = model(ids, labels=ids).loss
        if later == "two passes":
            with using(model, "b"):
                loss = loss * 2 + model(ids, labels=ids).loss
        if later == "switched":
            use(model, None)
        if later == "another block":
            with using(model, "b"):
                loss.backward()
        else:
            loss.backward()
        return [p.grad for name in "ab" for p in parameters(model, name)]

    for own, wanted in zip(gradients(True), gradients(False), strict=True):
        assert (own is None) == (wanted is None)
        if own is not None:
            torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-6)


def test_a_model_that_is_checkpointed_as_a_whole_goes_through_what_its_forward_did(ids: torch.Tensor) -> None:
    torch.manual_seed(1)
    inner = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    model = nn.ModuleDict({"inner": inner})
    for seed, name in enumerate("ab"):
        fill(attach(inner, LoRA(rank=2, alpha=5, targets="*"), name=name), name, seed=seed, size=0.9)
        for parameter in parameters(inner, name):
            parameter.requires_grad_(True)
    x = torch.randn(3, 6, requires_grad=True)
    with using(inner, "a"):
        wanted = torch.autograd.grad(inner(x).square().sum(), parameters(inner, "a"))
        loss = checkpoint(model["inner"], x, use_reentrant=False).square().sum()
    use(inner, "b")
    for own, other in zip(torch.autograd.grad(loss, parameters(inner, "a")), wanted, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_with_its_loss_is_not_guessed(reentrant: bool, model: Any, ids: torch.Tensor) -> None:
    for parameter in parameters(model, "a"):
        parameter.requires_grad_(True)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=x).logits.square().mean()

    with using(model, "a"):
        wanted = torch.autograd.grad(loss(embedded), embedded)[0]
        checkpoint(loss, embedded, use_reentrant=reentrant).backward()
        torch.testing.assert_close(embedded.grad, wanted)
        again = checkpoint(loss, embedded, use_reentrant=reentrant)
    with pytest.raises(AdapterError, match="last pass went through adapter 'a', this code goes through the base"):
        again.backward()


def test_a_block_that_is_opened_in_a_backward_pass_holds(model: Any, ids: torch.Tensor, expected: Any) -> None:
    seen: list[torch.Tensor] = []

    def look(grad: torch.Tensor) -> None:
        with using(model, "b"), torch.no_grad():
            seen.append(model(ids).logits)

    with using(model, "a"):
        loss = model(ids).logits
        loss.register_hook(look)
        loss.sum().backward()
    assert torch.equal(seen[0], expected["b"])


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=str)
@torch.no_grad()
def test_generate_goes_through_one_choice(settings: dict[str, Any], model: Any, ids: torch.Tensor) -> None:
    from transformers import LogitsProcessorList

    def switch(_: Any, scores: torch.Tensor) -> torch.Tensor:
        elsewhere(lambda: use(model, "b"))
        assert isinstance(elsewhere(lambda: detach(model, "a")), AdapterError)
        assert isinstance(elsewhere(lambda: merge(model, "b")), MergeError)
        with using(model, None):
            model(ids)
        return scores

    def generate(**more: Any) -> torch.Tensor:
        found: torch.Tensor = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, **settings, **more)
        return found

    use(model, "a")
    wanted = generate()
    assert torch.equal(generate(logits_processor=LogitsProcessorList([switch])), wanted)
    assert adapters(model).active == "b" and not torch.equal(generate(), wanted)


def test_generate_has_the_signature_and_documentation_of_the_class(model: Any, ids: torch.Tensor) -> None:
    import inspect

    signature = inspect.signature(type(model).generate)
    assert list(inspect.signature(model.generate).parameters) == list(signature.parameters)[1:]
    twin = copy.deepcopy(model)
    assert twin.generate.model() is twin and twin.generate.record is record_of(twin)
    assert "generate" not in vars(detach(twin)) and not twin._forward_pre_hooks and not twin.model._forward_hooks
    read = pickle.loads(pickle.dumps(model))
    assert read.generate.model() is read and read.generate.record is record_of(read)
    detach(read)
    assert "generate" not in vars(read) and "generate" in vars(model)


@torch.no_grad()
def test_copies_have_passes_of_their_own(model: Any, ids: torch.Tensor, expected: Any) -> None:
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        use(twin, "a")
        assert torch.equal(twin(ids).logits, expected["a"])
        with using(model, "b"), using(twin, None):
            assert torch.equal(twin(ids).logits, expected[None])
            assert torch.equal(model(ids).logits, expected["b"])


def test_a_detached_model_has_no_hooks_left(ids: torch.Tensor) -> None:
    model = tiny_llama()
    before = snapshot(model)
    for name in "abc":
        attach(model, LoRA(rank=2), name=name)
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    detach(model, "a")
    detach(model)
    assert_same(model, before)


@torch.no_grad()
def test_a_pass_that_fails_or_is_interrupted_leaves_nothing_behind(
    model: Any, ids: torch.Tensor, expected: Any
) -> None:
    def fail(*_: Any) -> None:
        raise error

    for error in (ValueError("on purpose"), KeyboardInterrupt()):
        hook = model.model.layers[1].register_forward_hook(fail)
        use(model, "a")
        with pytest.raises(type(error)):
            model(ids)
        hook.remove()
        use(model, "b")
        assert adapters(model).active == "b"
        assert torch.equal(model(ids).logits, expected["b"])
    model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt), using(model, "b"):
        model(ids)
    detach(model, "b")


@torch.no_grad()
def test_an_adapter_in_mid_pass_is_in_use(model: Any, ids: torch.Tensor, expected: Any) -> None:
    seen: list[Any] = []

    def act(*_: Any) -> None:
        seen.append(elsewhere(lambda: (use(model, "b"), detach(model, "a"))))

    hook = model.model.layers[0].register_forward_hook(act)
    use(model, "a")
    assert torch.equal(model(ids).logits, expected["a"])
    hook.remove()
    assert isinstance(seen[0], AdapterError) and "in use" in str(seen[0])
    detach(model, "a")


def test_a_task_goes_on_in_a_block_whose_adapter_is_gone(model: Any, ids: torch.Tensor) -> None:
    async def main() -> None:
        ready = asyncio.Event()

        async def later() -> None:
            await ready.wait()
            with torch.no_grad():
                model(ids)

        with using(model, "a"):
            tasks = [asyncio.create_task(later()) for _ in range(2)]
            await asyncio.sleep(0)
        merge(model, "b")
        ready.set()
        with pytest.raises(AdapterError, match="'b' was merged into the base in the meantime"):
            await tasks[0]
        with pytest.raises(AdapterError):
            await tasks[1]
        unmerge(model)
        ready.clear()
        with using(model, "a"):
            task = asyncio.create_task(later())
            await asyncio.sleep(0)
        detach(model, "a")
        ready.set()
        with pytest.raises(AdapterError, match="'a', which was detached in the meantime"):
            await task

    asyncio.run(main())


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model", "function", "layers"])
@torch.no_grad()
def test_compiled_code_goes_through_what_holds(what: str, model: Any, ids: torch.Tensor, expected: Any) -> None:
    for name in "ab":
        for parameter in parameters(model, name):
            parameter.requires_grad_(False)
    compiled: Any = model
    if what == "layers":
        for layer in model.model.layers:
            layer.compile(backend="eager")
    elif what == "model":
        compiled = torch.compile(model, backend="eager", fullgraph=True)
    else:
        compiled = torch.compile(lambda x: model(x), backend="eager")

    def check(name: str | None) -> None:
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids).logits, expected[name], rtol=1e-5, atol=1e-5)

    check(None)  # compiled outside of any block
    with using(model, "a"):
        check("a")
        elsewhere(lambda: check(None))
    use(model, "b")
    check("b")

    async def request(name: str | None) -> None:
        with using(model, name):
            await asyncio.sleep(0)
            check(name)

    async def main() -> None:
        await asyncio.gather(request("a"), request(None), request("b"))

    asyncio.run(main())
    check("b")


def test_generate_stops_where_its_adapter_was_taught_to(model: Any, ids: torch.Tensor) -> None:
    """As the model does that the adapter is merged into, unless the call says its own end tokens."""
    own = model.generation_config.eos_token_id

    def said(name: str | None, *inputs: Any, **settings: Any) -> list[int]:
        with using(model, name):
            out = model.generate(*inputs, **{"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | settings)
        return list(out[0, ids.shape[1] :].tolist())

    prompt = ids[:1]
    free = {name: said(name, prompt) for name in (None, "a", "b")}
    end = free["a"][2]
    teach(model, "a", [end, free["a"][5]])
    stopped = free["a"][: free["a"].index(end) + 1]
    assert said("a", prompt) == said("a", inputs=prompt) == said("a", prompt, generation_config=None) == stopped
    assert said("a", prompt, eos_token_id=95) == said("a", prompt, GenerationConfig(eos_token_id=95)) == free["a"]
    assert said(None, prompt) == free[None] and said("b", prompt) == free["b"]
    rows = prompt.expand(2, -1)
    with route(model, ["a", "b"]):  # b was taught no end
        both = model.generate(rows, max_new_tokens=6, do_sample=False, pad_token_id=0)[:, ids.shape[1] :].tolist()
    assert both == [free["a"], free["b"]]
    assert model.generation_config.eos_token_id == own


@pytest.mark.parametrize("kind", ["body", "llava", "itself"])
def test_a_route_of_an_inner_model_has_a_name_for_each_prompt_of_the_outer_ones_generate(
    kind: str, ids: torch.Tensor
) -> None:
    """One name for all prompts was taken, as if generate had made all rows of one."""
    from tests.conftest import tiny_llama
    from tests.files.test_renames import tiny_llava

    torch.manual_seed(3)
    outer: Any = (tiny_llava() if kind == "llava" else tiny_llama()).eval()
    inner: Any = {"llava": lambda: outer.model.language_model, "body": lambda: outer.model, "itself": lambda: outer}[
        kind
    ]()
    for name, seed in (("a", 3), ("b", 4)):
        fill(attach(inner, LoRA(rank=2), name=name), name, seed=seed)

    def generate(**settings: Any) -> torch.Tensor:
        given = {"attention_mask": torch.ones_like(ids[:2]), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        found: torch.Tensor = outer.generate(input_ids=ids[:2] % 60 + 5, **given, **settings)
        return found

    for settings in ({}, {"num_beams": 2}):
        alone = []
        for name in "ab":
            with using(inner, name):
                alone.append(generate(**settings))
        with route(inner, ["a", "b"]):
            both = generate(**settings)
        assert torch.equal(both[0], alone[0][0]) and torch.equal(both[1], alone[1][1])
        with route(inner, ["a"]), pytest.raises(AdapterError, match="names 1 row"):
            generate(**settings)


def test_end_tokens_of_a_model_without_generate_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tests.conftest import tiny_llama

    outer = tiny_llama().eval()
    fill(attach(outer, LoRA(rank=2)))
    save(outer, tmp_path / "whole", ends=[7])
    detach(outer)
    fill(attach(outer.model, LoRA(rank=2)))
    save(outer.model, tmp_path / "body", ends=[7])
    detach(outer.model)
    load(outer, tmp_path / "whole")
    detach(outer)
    assert not caplog.records
    load(outer.model, tmp_path / "body")
    assert "end with token 7, and a LlamaModel has no generate" in caplog.text
    caplog.clear()
    merge(outer.model)
    assert "end with token 7, and a LlamaModel has no generate" in caplog.text


def test_running_statistics_that_a_users_loop_moves_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """They are the base's, and no adapter holds them: what is loaded later was another model."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)))
    attach(model, LoRA(rank=2))
    x = torch.randn(5, 4)
    model.eval()
    model(x)
    to_train(model)
    before = model[1].running_mean.clone()
    model(x).sum().backward()
    assert torch.equal(model[1].running_mean, before) and not caplog.records
    model.train()
    for _ in range(3):
        model(x).sum().backward()
    (said,) = caplog.records
    assert "2 norms with running statistics are in training mode (1, 2.1)" in said.getMessage()
    caplog.clear()
    plain = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.BatchNorm1d(6, track_running_stats=False))
    attach(plain, LoRA(rank=2)).train()(x)
    assert not caplog.records
