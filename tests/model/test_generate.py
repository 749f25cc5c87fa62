"""Greedy is greedy, sampling is what was asked, whatever the base's generation_config says; completions stop where they were
taught to; nobody's random numbers are touched."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import deltaw
from deltaw.config import GenerateConfig
from deltaw.errors import AdapterError
from deltaw.model import generate as generating
from deltaw.model.ends import taught, teach
from deltaw.model.generate import KEPT, KEPT_OF_DECODERS, generate, settings
from tests.conftest import byte_llama, fill
from tests.data.conftest import tiny_tokenizer
from tests.training.test_models import tiny_of

PROMPTS = [[5, 6, 7, 8], [9, 10], [40, 41, 42], [6, 6, 6, 6, 6, 6]]
NEW = 12
# What a base's generation_config may say of how tokens are chosen. Each is as far from neutral as it goes
HOSTILE: dict[str, Any] = {
    "max_length": 6, "min_length": 40, "min_new_tokens": 9, "early_stopping": True, "max_time": 0.0, "stop_strings": ["a"],
    "do_sample": True, "num_beams": 3, "use_mtp": True, "temperature": 9.0, "top_k": 3, "top_p": 0.3, "min_p": 0.5,
    "top_h": 0.3, "typical_p": 0.3, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "repetition_penalty": 7.0,
    "encoder_repetition_penalty": 7.0, "length_penalty": -4.0, "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1, "bad_words_ids": [[i] for i in range(3, 90)], "renormalize_logits": True,
    "forced_eos_token_id": 7, "remove_invalid_values": True, "exponential_decay_length_penalty": (1, 50.0),
    "suppress_tokens": list(range(3, 90)), "begin_suppress_tokens": list(range(3, 200)),
    "sequence_bias": {(11,): 99.0}, "token_healing": True, "guidance_scale": 4.0,
    "watermarking_config": {"bias": 50.0, "seeding_scheme": "selfhash"}, "num_return_sequences": 2, "output_attentions": True,
    "output_hidden_states": True, "output_scores": True, "output_logits": True, "return_dict_in_generate": True,
    "is_assistant": True, "num_assistant_tokens": 2, "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.1, "prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2,
    "assistant_early_exit": 1, "assistant_lookbehind": 2, "target_lookbehind": 2, "assistant_ensemble_weight": 0.5,
    "speculation_type": "x", "cache_implementation": "static", "cache_config": {"nbits": 2}, "max_cache_len": 3,
    "compile_config": None, "disable_compile": False, "low_memory": True, "penalty_alpha": 0.6, "dola_layers": "high",
    "diversity_penalty": 3.0, "num_beam_groups": 3, "constraints": None, "force_words_ids": [[11]],
    "prefill_chunk_size": 1, "continuous_batching_config": None, "max_new_tokens": 1, "a_field_of_the_base_s_own": 5,
    "pad_token_id": 44,
}  # fmt: skip
# No choice of a token follows from these
PASSED_OVER = {"_from_model_config", "_commit_hash", "transformers_version", "_original_object_hash"}


def hostile(model: Any, **kept: Any) -> Any:
    """The model with every habit at once; transformers would not let this be loaded, and takes it all from an object."""
    for name, value in HOSTILE.items():
        setattr(model.generation_config, name, value)
    for name, value in kept.items():
        setattr(model.generation_config, name, value)
    return model


def likeliest(model: Any, ids: list[int], stop: int | None, decoder: list[int] | None = None) -> list[int]:
    """One prompt by the definition: the largest logit, a token at a time, without a cache."""
    out: list[int] = []
    with torch.no_grad():
        for _ in range(NEW):
            if decoder is None:
                logits = model(torch.tensor([ids + out])).logits
            else:
                logits = model(torch.tensor([ids]), decoder_input_ids=torch.tensor([decoder + out])).logits
            token = int(logits[0, -1].argmax())
            if token == stop:
                break
            out.append(token)
    return out


def test_every_field_of_transformers_settings_is_known_here() -> None:
    """A field that a new version brings is tried as a habit of a base before it is believed to be neutral."""
    fields = set(vars(GenerationConfig())) | set(GenerationConfig._get_default_generation_params())
    kept = {*KEPT, *KEPT_OF_DECODERS}
    assert fields <= HOSTILE.keys() | PASSED_OVER | kept
    assert not HOSTILE.keys() & kept


def test_temperature_zero_takes_the_largest_logit_whatever_the_base_is_used_to() -> None:
    tokenizer = tiny_tokenizer()
    model = byte_llama(tokenizer)
    expected = [
        tokenizer.decode(likeliest(model, p, tokenizer.eos_token_id), skip_special_tokens=True) for p in PROMPTS
    ]
    hostile(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(model, tokenizer, PROMPTS, GenerateConfig(max_new_tokens=NEW, batch=3)) == expected
    assert model.generation_config.repetition_penalty == 7.0, "the model's own config stays as it was"


@pytest.mark.parametrize("name", [n for n in HOSTILE if n not in ("do_sample", "num_beams", "watermarking_config")])
def test_no_habit_of_a_base_changes_a_sample(name: str) -> None:
    tokenizer = tiny_tokenizer()
    model = byte_llama(tokenizer)
    asked = GenerateConfig(max_new_tokens=6, temperature=0.7, top_p=0.9, seed=4)
    expected = generate(model, tokenizer, PROMPTS, asked)
    setattr(model.generation_config, name, HOSTILE[name])
    assert generate(model, tokenizer, PROMPTS, asked) == expected


def tiny_decoder(kind: str, tokenizer: Any) -> Any:
    torch.manual_seed(3)
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    if kind == "t5":
        config = T5Config(d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3, decoder_start_token_id=0, **sizes)
        return T5ForConditionalGeneration(config).eval()
    config = BartConfig(
        d_model=24, encoder_layers=1, decoder_layers=2, encoder_attention_heads=3, decoder_attention_heads=3,
        encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=64, bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id, **sizes,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_decoder_of_an_encoders_begins_as_its_config_says_and_then_is_greedy(kind: str) -> None:
    """BART's starts with what ends a text, and mBART's is told its language by a forced first token."""
    tokenizer = tiny_tokenizer()
    model = tiny_decoder(kind, tokenizer)
    start, language = model.config.decoder_start_token_id, 77
    alone = [likeliest(model, p, tokenizer.eos_token_id, [start, language]) for p in PROMPTS]
    expected = [tokenizer.decode([language, *ids][:NEW], skip_special_tokens=True) for ids in alone]
    hostile(model, forced_bos_token_id=language)
    assert generate(model, tokenizer, PROMPTS, GenerateConfig(max_new_tokens=NEW)) == expected


def test_beams_are_those_asked_for_alone() -> None:
    tokenizer = tiny_tokenizer()
    model = byte_llama(tokenizer)
    asked = GenerateConfig(max_new_tokens=6, beams=3, length_penalty=0.5)
    expected = generate(model, tokenizer, PROMPTS, asked)
    assert generate(hostile(model), tokenizer, PROMPTS, asked) == expected


# --- where it stops ---------------------------------------------------------------------------------------------


def test_the_base_s_end_tokens_are_kept_and_extended() -> None:
    tokenizer = tiny_tokenizer()
    model = byte_llama(tokenizer)
    model.generation_config.eos_token_id = [90, 91]
    asked = settings(model, tokenizer, GenerateConfig(), [17, 91])
    assert asked.eos_token_id == [90, 91, tokenizer.eos_token_id, 17]
    model.generation_config.eos_token_id = tokenizer.eos_token_id = None
    assert settings(model, tokenizer, GenerateConfig()).eos_token_id is None
    assert len(generate(model, tokenizer, [[5]], GenerateConfig(max_new_tokens=4))) == 1


def test_an_end_that_is_no_special_token_is_not_shown() -> None:
    tokenizer = tiny_tokenizer()
    model = byte_llama(tokenizer)
    ids = likeliest(model, PROMPTS[0], None)
    last = next(i for i in range(2, NEW) if ids[i] not in ids[:i])
    said = generate(model, tokenizer, PROMPTS[:1], GenerateConfig(max_new_tokens=NEW), ends=[ids[last]])
    assert said == [tokenizer.decode(ids[:last], skip_special_tokens=True)]


@pytest.mark.parametrize("beams", [1, 2])
def test_each_row_of_a_route_stops_where_its_own_adapter_was_taught_to(beams: int) -> None:
    tokenizer = tiny_tokenizer()
    model = byte_llama(tokenizer)
    names = ["a", None, "b", "a"]
    for seed, name in enumerate("ab"):
        fill(deltaw.attach(model, deltaw.LoRA(rank=3 + seed, alpha=5.0), name=name), name, seed=seed)
    asked = GenerateConfig(max_new_tokens=8, beams=beams, batch=3)

    def alone(prompt: list[int], name: str | None) -> str:
        with deltaw.using(model, name):
            return generate(model, tokenizer, [prompt], asked)[0]

    free = [alone(prompt, name) for prompt, name in zip(PROMPTS, names, strict=True)]
    with deltaw.using(model, "a"):
        teach(model, "a", likeliest(model, PROMPTS[0], None)[3:4])
    with deltaw.using(model, "b"):
        teach(model, "b", likeliest(model, PROMPTS[2], None)[2:3])
    assert taught(model, ["a"]) != taught(model, ["b"])
    expected = [alone(prompt, name) for prompt, name in zip(PROMPTS, names, strict=True)]
    assert expected != free and expected[1] == free[1]
    done: list[int] = []
    with deltaw.route(model, names):
        assert generate(model, tokenizer, PROMPTS, asked, on_done=done.append) == expected
        with pytest.raises(AdapterError, match="names 4 rows, and there are 3 prompts"):
            generate(model, tokenizer, PROMPTS[:3], asked)
    assert done[-1] == 4 and done == sorted(done)


# --- random numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_generating_leaves_the_callers_random_numbers_as_they_were(temperature: float) -> None:
    tokenizer = tiny_tokenizer()
    model = byte_llama(tokenizer)
    asked = GenerateConfig(max_new_tokens=4, temperature=temperature, seed=3)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = generate(model, tokenizer, PROMPTS, asked)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    assert generate(model, tokenizer, PROMPTS, asked) == first


# --- prompts that begin alike ------------------------------------------------------------------------------------

SYSTEM = [5 + i * 7 % 60 for i in range(45)]
ASKED = [[9, 8, 7], [6, 6, 6, 6, 6, 9, 30], [11], [44, 3, 44]]


def read(model: Any) -> list[int]:
    """The tokens that each pass over the model's body reads, from now on."""
    counts: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda body, args, named: counts.append(named["input_ids"].numel()) if named.get("input_ids") is not None else None,
        with_kwargs=True,
    )  # fmt: skip
    return counts


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma3_text", "bloom", "opt", "gpt_neox", "phi3"])
@pytest.mark.parametrize("method", [None, deltaw.LoRA(rank=2, alpha=8), deltaw.Prefix(length=3)], ids=repr)
def test_what_prompts_begin_with_alike_is_read_once(kind: str, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_of(kind).eval()
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = None
    if method is not None:
        deltaw.attach(model, method)
        fill(model)
    prompts = [[*SYSTEM, *asked] for asked in ASKED]
    config = GenerateConfig(max_new_tokens=6, batch=4)
    counts = read(model)
    shared = generate(model, tokenizer, prompts, config)
    monkeypatch.setattr(generating, "_LEAST", 10**9)
    if kind in ("llama", "gpt2", "qwen2") and not isinstance(method, deltaw.Prefix):
        assert counts.count(45) == 1 and max(counts) < 4 * 45, "by itself, and by no prompt again"
    assert shared == generate(model, tokenizer, prompts, config)


@torch.no_grad()
def test_windows_and_few_tokens_are_read_as_they_are() -> None:
    model = tiny_of("llama")
    asked = settings(model, tiny_tokenizer(), GenerateConfig(max_new_tokens=4))
    reader = generating._Reader(model, asked)
    assert reader.read([[1, 2, 3], [1, 2, 4]]) == (0, None)
    held, cache = reader.read([[*SYSTEM, 1], [*SYSTEM, 2, 3], [*SYSTEM, 2], [*SYSTEM, 4]])
    assert held == 45 and cache is not None and cache.get_seq_length() == 45
    held, cache = reader.read([SYSTEM, [*SYSTEM, 2, 3], [*SYSTEM, 2], [*SYSTEM, 4]])
    assert held == 44, "each prompt has a token left to go on from"
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert reader.read([[*SYSTEM, 1], [*SYSTEM, 2, 3], [*SYSTEM, 2], [*SYSTEM, 4]]) == (0, None)
    model.config.rope_parameters = {
        "full_attention": {"rope_type": "longrope"},
        "sliding_attention": {"rope_type": "default"},
    }
    assert reader.read([[*SYSTEM, 1], [*SYSTEM, 2, 3], [*SYSTEM, 2], [*SYSTEM, 4]]) == (0, None)
    model.config.rope_parameters = {"rope_type": "yarn"}
    assert reader.read([[*SYSTEM, 1], [*SYSTEM, 2, 3], [*SYSTEM, 2], [*SYSTEM, 4]])[0] == 45
    model.config.attention_window = 50
    assert reader.read([[*SYSTEM, 1], [*SYSTEM, 2, 3], [*SYSTEM, 2], [*SYSTEM, 4]]) == (0, None)


def test_prompts_of_one_document_are_a_batch() -> None:
    documents = [[d] * 60 for d in (3, 4)]
    prompts = [[*documents[i % 2], *range(5, 5 + i)] for i in range(8)]
    assert [{i % 2 for i in batch} for batch in generating._batches(prompts, range(8), 4, shared=True)] == [{1}, {0}]
    assert generating._batches(prompts, range(8), 4, shared=False)[0] == [7, 6, 5, 4]
