"""Batches of three rows that a model of transformers takes, made from the names of its forward's arguments and its config."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

ROWS = 3
LENGTH = 12
Batch = dict[str, Any]


def batches(model: Any, *, alone: bool = False) -> Iterator[Batch]:
    """Batches to try on this model: with images and sounds where it takes some, or texts alone."""
    arguments = inspect.signature(model.forward).parameters
    wanted = [n for n, p in arguments.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = [n for n in wanted if arguments[n].default is inspect.Parameter.empty]
    texts = _texts(model, wanted, required)
    images, sounds = [*_images(model.config, wanted)], [*_sounds(model.config, wanted)]
    if alone:
        if texts and (images[0] or sounds[0]):
            yield _complete(model, texts, wanted)
        return
    for pixels in images:
        for waves in sounds:
            yield _complete(model, {**texts, **pixels, **waves, **_others(model, wanted, required)}, wanted)


def _complete(model: Any, batch: Batch, wanted: list[str]) -> Batch:
    """With what follows from the rest: masks, kinds of tokens."""
    if "use_cache" in wanted:
        batch = {**batch, "use_cache": False}
    if "return_loss" in wanted:
        batch = {**batch, "return_loss": False}
    if "image_attention_mask" in wanted and "pixel_values" in batch and "input_ids" in batch:
        seen = torch.ones(*batch["input_ids"].shape, batch["pixel_values"].shape[1], dtype=torch.long)
        batch = {**batch, "image_attention_mask": seen}
    token = _image_token(model.config)
    if token is not None and "input_ids" in batch and not (batch["input_ids"] == token).any() and _has_images(batch):
        places = setting(model.config, "num_query_tokens", default=1)  # a model with queries may not count them
        batch = {**batch, "input_ids": torch.cat([torch.full((ROWS, places), token), batch["input_ids"]], 1)}
    if "mm_token_type_ids" in wanted and "input_ids" in batch:
        image, video = setting(model.config, "image_token_id"), setting(model.config, "video_token_id")
        tokens = batch["input_ids"]
        kinds = (0 if image is None else (tokens == image).long()) + (
            0 if video is None else 2 * (tokens == video).long()
        )
        kinds = kinds if isinstance(kinds, Tensor) else torch.zeros_like(tokens)
        batch = {**batch, "mm_token_type_ids": kinds, "moe_mm_token_type_ids": kinds}
    for mask in ("input_features_mask", "feature_attention_mask"):
        if mask in wanted and "input_features" in batch:
            batch = {**batch, mask: torch.ones(ROWS, batch["input_features"].shape[-1], dtype=torch.long)}
    return {n: v for n, v in batch.items() if n in wanted}


def setting(config: PretrainedConfig, *names: str, default: Any = None) -> Any:
    """The first of these fields that the config, or one of its parts, has."""
    for name in names:
        for part in parts(config):
            value = vars(part).get(name, getattr(type(part), name, None))
            if value is not None and not callable(value) and not isinstance(value, property):
                return value
    return default


def parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from parts(value)


def generator(seed: int = 4) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 4) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def ids(vocabulary: int, *shape: int, seed: int = 2, without: frozenset[int] = frozenset()) -> Tensor:
    """Tokens, none of them a special one."""
    usual = torch.tensor([i for i in range(4, vocabulary) if i not in without] or [0])
    return usual[torch.randint(len(usual), shape, generator=generator(seed))]


def special(config: PretrainedConfig) -> frozenset[int]:
    tokens: set[int] = set()
    for part in parts(config):
        for name, value in vars(part).items():
            if re.fullmatch(r".*(token_id|token_index|token_ids)", name):
                tokens |= {v for v in (value if isinstance(value, (list, tuple)) else [value]) if type(v) is int}
    return frozenset(tokens)


# --- texts ------------------------------------------------------------------------------------------------------


def _texts(model: Any, wanted: list[str], required: list[str]) -> Batch:
    config, batch = model.config, Batch()
    vocabulary = setting(config, "vocab_size", "n_vocab", default=32)
    vocabulary = vocabulary if isinstance(vocabulary, int) else 32
    usual = special(config)
    if "input_ids" in wanted:
        batch["input_ids"] = ids(vocabulary, ROWS, LENGTH, without=usual)
        eos = setting(config, "eos_token_id")
        if type(eos) is int and 0 < eos < vocabulary:
            batch["input_ids"][:, -1] = eos
    if "attention_mask" in required:
        batch["attention_mask"] = torch.ones(ROWS, LENGTH, dtype=torch.long)
    if "decoder_input_ids" in wanted and (
        getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" in required
    ):
        target = setting(config, "decoder_vocab_size", "tgt_vocab_size", "vocab_size", default=32)
        books = setting(config, "num_codebooks", default=1) if hasattr(config, "audio_encoder") else 1
        batch["decoder_input_ids"] = ids(target, ROWS * books, 7, seed=3, without=usual)
    if "bbox" in wanted:
        side = setting(config, "max_2d_position_embeddings", default=100)
        corners = torch.randint(1, min(side, 100) // 2, (ROWS, LENGTH, 4), generator=generator())
        corners[..., 2:] += corners[..., :2]
        batch["bbox"] = corners
    return batch


# --- images -----------------------------------------------------------------------------------------------------


def _images(config: PretrainedConfig, wanted: list[str]) -> Iterator[Batch]:
    names = [n for n in ("pixel_values", "image_pixel_values", "pixel_values_videos") if n in wanted]
    if not names:
        yield {}
        return
    name = names[0]
    channels = setting(config, "num_channels", "in_channels", "in_chans", "input_channels", default=3)
    channels = channels if isinstance(channels, int) else 3
    sides = _sides(config)
    for side in sides:
        size = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
        still = noise(ROWS, channels, *size)
        frames = setting(config, "num_frames", "frames_per_clip", default=2)
        frames = frames if isinstance(frames, int) else 2
        if "image_grid_thw" in wanted:
            yield _grid(config, channels)
        yield {name: still}
        yield {name: noise(ROWS, frames, channels, *size)}
        yield {name: noise(ROWS, channels, frames, *size)}
    if "spatial_shapes" in wanted:
        patch = setting(config, "patch_size", default=16)
        mask, shapes = torch.ones(ROWS, 16, dtype=torch.long), torch.tensor([[4, 4]] * ROWS)
        yield {name: noise(ROWS, 16, channels * patch**2), "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _sides(config: PretrainedConfig) -> list[Any]:
    found = [v for part in parts(config) if (v := vars(part).get("image_size")) is not None]
    found += [v for part in parts(config) if (v := vars(part).get("input_size")) is not None]
    found += [v for part in parts(config) if (v := vars(part).get("max_img_size")) is not None]
    found = [tuple(v.values()) if isinstance(v, dict) else v for v in found]
    # An image that is shown above its prompt's
    found += [(v[1], v[1]) for v in found if isinstance(v, (list, tuple)) and len(v) == 2 and v[0] == 2 * v[1]]
    return [v for v in dict.fromkeys(tuple(v) if isinstance(v, list) else v for v in found) if v] + [64, 224]


def _grid(config: PretrainedConfig, channels: int) -> Batch:
    """Patches one after the other, as Qwen's models take them."""
    patch = setting(config, "patch_size", default=14)
    frames = setting(config, "temporal_patch_size", default=1)
    patches = 16
    return {
        "pixel_values": noise(ROWS * patches, channels * frames * patch * patch),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * ROWS),
    }


# --- sounds -----------------------------------------------------------------------------------------------------


def _sounds(config: PretrainedConfig, wanted: list[str]) -> Iterator[Batch]:
    if "input_values" in wanted:
        mel = setting(config, "num_mel_bins", default=16)
        yield {"input_values": noise(ROWS, 4000)}
        yield {"input_values": noise(ROWS, 1, 4000)}
        frames = setting(config, "max_length", default=64)
        yield {"input_values": noise(ROWS, frames if isinstance(frames, int) else 64, mel)}
        yield {"input_values": noise(ROWS, 1, mel, 64)}
    elif "input_features" in wanted:
        mel = setting(
            config,
            *("num_mel_bins", "n_mels", "input_feat_per_channel", "feature_size", "input_dim"),
            *("feature_projection_input_dim", "num_chroma"),
            default=16,
        )
        places = setting(config, "max_source_positions", default=64)
        for length in dict.fromkeys((2 * places if places < 2000 else 128, 128, 3000)):
            yield {"input_features": noise(ROWS, mel, length)}
            yield {"input_features": noise(ROWS, length, mel)}
            yield {"input_features": noise(ROWS, 1, length, mel)}
        size = setting(config, "spec_size", default=64)
        yield {"input_features": noise(ROWS, 1, size, mel)}
    else:
        yield {}


# --- others -----------------------------------------------------------------------------------------------------


def _others(model: Any, wanted: list[str], required: list[str]) -> Batch:
    config, batch = model.config, Batch()
    for name in ("past_values", "inputs"):
        if name in required and name == "past_values":
            length = setting(config, "context_length", "input_size", default=32)
            lags = max(setting(config, "lags_sequence", default=[0]) or [0])
            channels = setting(config, "num_input_channels", "input_size", default=1)
            several = channels > 1 or setting(config, "num_input_channels") is not None
            batch["past_values"] = noise(ROWS, length + lags, channels) if several else noise(ROWS, length + lags)
            batch["past_time_features"] = noise(ROWS, length + lags, setting(config, "num_time_features", default=0))
            batch["past_observed_mask"] = torch.ones_like(batch["past_values"])
            ahead = setting(config, "prediction_length", "horizon_length", default=4)
            batch["future_values"] = noise(ROWS, ahead)
            batch["future_time_features"] = noise(ROWS, ahead, setting(config, "num_time_features", default=0))
    return batch | _named(model, wanted, required)


def _named(model: Any, wanted: list[str], required: list[str]) -> Batch:
    """Inputs that only some models have, by their names."""
    config, batch = model.config, Batch()
    width = setting(config, "hidden_size", "d_model", default=32)
    if "visual_feats" in wanted and "visual_pos" in wanted:
        batch["visual_feats"] = noise(ROWS, 5, setting(config, "visual_feat_dim", default=32))
        batch["visual_pos"] = noise(ROWS, 5, setting(config, "visual_pos_dim", default=4)).abs()
    if "flattened_patches" in wanted:
        places = torch.tensor([[1 + i // 3, 1 + i % 3] for i in range(9)]).expand(ROWS, 9, 2)
        pixels = noise(ROWS, 9, setting(config, "patch_embed_hidden_size", default=768))
        batch["flattened_patches"] = torch.cat([places.float(), pixels], 2)
        batch["decoder_input_ids"] = ids(setting(config, "vocab_size", default=32), ROWS, 7, seed=3)
    if "context_input_ids" in wanted:
        documents = setting(config, "n_docs", default=2)
        batch["context_input_ids"] = ids(setting(config, "vocab_size", default=32), ROWS * documents, LENGTH)
        batch["context_attention_mask"] = torch.ones(ROWS * documents, LENGTH, dtype=torch.long)
        batch["doc_scores"] = noise(ROWS, documents)
    if "state" in required and "actions" in wanted:
        batch["actions"] = noise(
            ROWS, setting(config, "chunk_size", default=4), setting(config, "max_action_dim", default=32)
        )
    side = setting(config, "image_size", default=[64, 64])
    side = side[1] if isinstance(side, (list, tuple)) else side
    makers = {
        "noise_embeds": lambda: noise(ROWS, 4, width),
        "context_hidden_states": lambda: noise(ROWS, LENGTH, width),
        "hidden_states": lambda: noise(ROWS, LENGTH, width),
        "encoder_hidden_states": lambda: noise(ROWS, LENGTH, width, seed=5),
        "state": lambda: noise(ROWS, setting(config, "max_state_dim", default=32)),
        "timestep": lambda: noise(ROWS).sigmoid(),
        "task_inputs": lambda: ids(
            setting(config, "text_encoder_vocab_size", default=32), ROWS, setting(config, "task_seq_len", default=7)
        ),
        "prompt_pixel_values": lambda: noise(ROWS, 3, side, side),
        "prompt_masks": lambda: noise(ROWS, 3, side, side, seed=6),
        "marks": lambda: torch.tensor([[1, 3, 5]] * ROWS),
        "num_options": lambda: torch.tensor([2] * ROWS),
        "question_type_ids": lambda: torch.zeros(ROWS, dtype=torch.long),
    }
    return batch | {name: make() for name, make in makers.items() if name in required}


# --- images within texts ----------------------------------------------------------------------------------------

_TOKENS = (
    "image_token_id", "image_token_index", "video_token_id", "audio_token_id", "audio_token_index", "im_patch_id", "image_patch_id",
)  # fmt: skip


def _image_token(config: PretrainedConfig) -> int | None:
    """The token in whose places images or sounds stand."""
    return next((t for name in _TOKENS if type(t := setting(config, name)) is int), None)


def _has_images(batch: Batch) -> bool:
    return any(name in batch for name in ("pixel_values", "input_features", "pixel_values_videos"))


_NUMBERS = re.compile(r"tokens?:?\s*\D*?(\d+).*?features?:?\s*\D*?(\d+)", re.IGNORECASE | re.DOTALL)


def with_places(model: Any, batch: Batch, error: str) -> Batch | None:
    """The batch with as many image tokens in each row as the model says in its error that it has features."""
    config = model.config
    token = _image_token(config)
    numbers = [int(n) for n in re.findall(r"\d+", error)]
    if token is None or "input_ids" not in batch or not numbers or "token" not in error.lower():
        return None
    features = _NUMBERS.search(error)
    count = int(features[2]) if features else max(numbers)
    if features and features[1] == features[2]:  # it counts numbers, not places
        count //= setting(config, "hidden_size", default=32)
    each = count // ROWS if count % ROWS == 0 else count
    if not 0 < each <= 2048:
        return None
    text = batch["input_ids"]
    tokens = text[text != token].view(ROWS, -1) if (text == token).any() else text
    places = torch.full((ROWS, each), token, dtype=text.dtype)
    batch = {**batch, "input_ids": torch.cat([tokens[:, :2], places, tokens[:, 2:]], 1)}
    return _complete(model, batch, [*inspect.signature(model.forward).parameters])
