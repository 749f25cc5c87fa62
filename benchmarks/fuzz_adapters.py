"""Damaged adapters, and what they should come to. benchmarks/fuzz.py runs them.

The reference reads a folder by `json`, safetensors and torch alone: ΔW = α/r·BA. Of a file with a checksum it is that of the file
before the damage.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import deltaw
from deltaw.cli.main import main as command_line
from deltaw.errors import DeltaWError
from deltaw.files.formats import peft
from deltaw.files.verify import verify_adapter
from deltaw.model.summary import updates as updates_of

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 3, 8.5, 1e308, -1e308, 10**30, 10**400, "", "x", "q_proj", "(", "(a+)+$", r"(.*\.)*(.*)*q_projx",
    "a" * 5000,
       [], {}, [None], [1], ["q_proj"], ["("], [[]], {"a": 1}, {"(": 2}, {"(a+)+$": 2},
    {"q": None}, {"q": 10**400}, {"(a)\\1": 3},
    "../../etc/passwd", "\x1b[31m[red]", "\ud800", 2**63, 2**64, [2**64], {"a": [2**70]}, float("nan"), float("inf"),
]  # fmt: skip
KEYS = [
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "use_dora", "bias",
    "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "trainable_token_indices", "ensure_weight_tying", "base_model_name_or_path", "task_type", "init_lora_weights",
    "deltaw_method",    "settings", "feedforward_modules", "num_virtual_tokens", "unknown_key",
    "fan_in_fan_out", "peft_version", "layer_replication",
]  # fmt: skip
DEEP = "[" * 5000 + "]" * 5000
NUMBERS: list[Any] = [-1, 0, 1, 1.5, True, "4", None, 2**31, 2**62, 2**64, 10**400, [], float("nan")]
Meaning = dict[str, Tensor]
"""Layer name → ΔW in fp64."""


@dataclass(frozen=True)
class Outcome:
    """What came of one case: right, refused, silent (a wrong value, without a word) or changed (something, before an error)."""

    result: str
    mutation: str
    what: str = ""


def rng(seed: int, number: int) -> Random:
    """Return the random numbers of one case."""
    return Random(f"{seed} {number}")


# --- the adapters before the damage -----------------------------------------------------------------------------


def tiny(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=32,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def seeds(folder: Path) -> dict[str, Path]:
    """Write a base and sound adapters of several kinds. Return name → folder."""
    tiny().save_pretrained(folder / "base")
    tiny(1).save_pretrained(folder / "other")
    methods = {
        "lora": deltaw.LoRA(rank=2, targets="qv"),
        "dora": deltaw.DoRA(rank=2, targets="q"),
        "ia3": deltaw.IA3(),
        "bitfit": deltaw.BitFit(add=True),
    }
    paths = {}
    for name, method in methods.items():
        model = deltaw.attach(tiny(), method)
        for i, parameter in enumerate(deltaw.parameters(model)):
            generator = torch.Generator().manual_seed(i)
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 + (name == "dora") * 1.0
        paths[name] = deltaw.save(model, folder / name, ends=[2], training={"form": "prompt"})
    for name in ("lora", "ia3"):
        foreign = paths[f"foreign {name}"] = folder / f"foreign {name}"
        shutil.copytree(paths[name], foreign)
        save_file(load_file(foreign / WEIGHTS), foreign / WEIGHTS)
    pickled = paths["pickled"] = folder / "pickled"
    shutil.copytree(paths["foreign lora"], pickled)
    torch.save(load_file(pickled / WEIGHTS), pickled / PICKLED)
    (pickled / WEIGHTS).unlink()
    return paths


# --- damage -----------------------------------------------------------------------------------------------------


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(path: Path, header: Any, payload: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)


def flipped(path: Path, random: Random, start: int, end: int) -> None:
    raw = bytearray(path.read_bytes())
    for _ in range(random.choice((1, 1, 1, 4))):
        raw[random.randrange(start, end)] ^= 1 << random.randrange(8)
    path.write_bytes(raw)


def damage_bytes(path: Path, random: Random) -> str:
    """Change bytes of any file."""
    size = path.stat().st_size
    kind = random.choice(("flip", "cut", "more", "zeros", "foreign", "empty", "not UTF-8"))
    raw = bytearray(path.read_bytes())
    at = random.randrange(size)
    if kind == "flip":
        flipped(path, random, 0, size)
        return "bytes: flip"
    if kind == "cut":
        raw = raw[:at]
    elif kind == "more":
        raw += random.randbytes(random.choice((1, 8, 1000)))
    elif kind == "empty":
        raw = bytearray()
    elif kind == "not UTF-8":
        raw[at:at] = b"\xff\xfe"
    else:
        block = raw[at : at + random.choice((1, 16, 64))]
        raw[at : at + len(block)] = bytes(len(block)) if kind == "zeros" else random.randbytes(len(block))
    path.write_bytes(raw)
    return f"bytes: {kind}"


def damage_header(path: Path, random: Random) -> str:
    """Change what a safetensors header says."""
    header, payload = parts(path)
    names = [name for name in header if name != "__metadata__"]
    name = random.choice(names)
    kind = random.choice(
        (
            "shape",
            "dtype",
            "offsets",
            "rename",
            "drop",
            "swap",
            "duplicate",
            "length",
            "type",
            "metadata",
            "deep",
            "entry",
        )
    )
    entry = header[name]
    if kind == "shape":
        entry["shape"] = random.choice(
            [
                [random.choice(NUMBERS) for _ in range(random.randrange(4))],
                entry["shape"][::-1],
                [0, 2**62, 2**62],
                [*entry["shape"], 1],
            ]
        )
    elif kind == "dtype":
        entry["dtype"] = random.choice(
            ["F64", "F16", "BF16", "I32", "U8", "I8", "BOOL", "F8_E4M3", "F4", "", None, 7, [], "f32"]
        )
    elif kind == "offsets":
        entry["data_offsets"] = random.choice(
            [
                [random.choice(NUMBERS), random.choice(NUMBERS)],
                [],
                entry["data_offsets"][::-1],
                "0 4",
                header[random.choice(names)]["data_offsets"],
            ]
        )
    elif kind == "rename":
        tricks = (
            "../../x",
            "",
            "a" * 10000,
            "\x1b[2J",
            name[1:],
            name.upper(),
            name.replace("q_proj", "k_proj"),
            name + ".x",
            "module." + name,
            "\ud800",
            "__metadata__2",
        )
        header = {random.choice(tricks) if n == name else n: value for n, value in header.items()}
    elif kind == "drop":
        del header[name]
    elif kind == "swap":
        other = random.choice(names)
        header[name], header[other] = header[other], header[name]
    elif kind == "duplicate":
        text = json.dumps(header)
        joined(
            path, (text[:-1] + f", {json.dumps(name)}: {json.dumps(header[random.choice(names)])}}}").encode(), payload
        )
        return "header: duplicate"
    elif kind == "length":
        raw = path.read_bytes()
        path.write_bytes(
            random.choice([0, 1, 7, 2**63, 2**64 - 1, len(raw), len(raw) - 9]).to_bytes(8, "little") + raw[8:]
        )
        return "header: length"
    elif kind == "type":
        joined(path, random.choice([b"[]", b"null", b"3", b'""', b"", b"{", b"\xff", b"{}", b"[{}]"]), payload)
        return "header: type"
    elif kind == "deep":
        joined(
            path,
            random.choice(
                [
                    DEEP,
                    json.dumps(header)[:-1] + ', "__metadata__": {"a": ' + DEEP + "}}",
                    '{"a":' * 3000 + "1" + "}" * 3000,
                ]
            ).encode(),
            payload,
        )
        return "header: deep"
    elif kind == "entry":
        header[name] = random.choice(JUNK)
    else:
        metadata = header.setdefault("__metadata__", {})
        key = random.choice(
            [
                *metadata,
                "deltaw_slices",
                "deltaw_scales",
                "deltaw_ends",
                "deltaw_transposed",
                "deltaw_settings",
                "deltaw_replaced",
            ]
        )
        metadata[key] = random.choice(
            [
                "",
                "[",
                "{}",
                "[]",
                "null",
                DEEP,
                '{"a": 1}',
                "[-1]",
                '{"a": {"b": [[1, 0]]}}',
                '{"a": NaN}',
                "1" * 400,
                7,
                None,
                {},
                '{"a":1,"a":2}',
                '[{"a": 1}]',
            ]
        )
        if random.random() < 0.2:
            header["__metadata__"] = random.choice(JUNK)
    joined(path, header, payload)
    return f"header: {kind}"


def damage_config(path: Path, random: Random) -> str:
    """Change the settings."""
    settings = json.loads(path.read_text())
    kind = random.choice(("value", "value", "value", "value", "drop", "duplicate", "deep", "type", "large"))
    key = random.choice(KEYS)
    if kind == "value":
        settings[key] = random.choice(JUNK)
        path.write_text(json.dumps(settings))
        return f"config: {key}"
    if kind == "drop":
        settings.pop(key, None)
        path.write_text(json.dumps(settings))
    elif kind == "duplicate":
        path.write_text(
            json.dumps(settings)[:-1] + f', "{random.choice(sorted(settings))}": {json.dumps(random.choice(JUNK))}}}'
        )
    elif kind == "deep":
        path.write_text(
            json.dumps(settings)[:-1] + f', "{key}": ' + random.choice([DEEP, '{"a":' * 900 + "1" + "}" * 900]) + "}"
        )
    elif kind == "large":
        settings[key] = random.choice([["x"] * 100_000, {f"k{i}": i for i in range(20_000)}, "x" * 500_000])
        path.write_text(json.dumps(settings))
    else:
        path.write_text(random.choice(["[]", "null", "3", '""', "", "{", "{}", "NaN", "[{}]"]))
    return f"config: {kind}"


class _Runs:
    """A pickle of this writes a file where it is read by pickle itself."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def damage_pickle(path: Path, random: Random) -> str:
    """Put wrong contents into a pickled file."""
    tensors: dict[Any, Any] = torch.load(path, weights_only=True)
    key = random.choice(sorted(tensors))
    t = tensors[key]
    wrong: dict[str, Any] = {
        "meta": t.to("meta"), "sparse": t.to_sparse(), "int8": t.to(torch.int8), "none": None,
        "expanded": torch.zeros(1).expand(1 << 20, 1 << 10),
        "quantised": torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "complex": t.to(torch.complex64), "nested": {"a": t},
        "list": [t],
        "NaN": t * float("nan"), "parameter": torch.nn.Parameter(t), "bool": t > 0, "scalar": t[0, 0].clone(), "half": t.half(),
        "csr": t.to_sparse_csr(), "number": 3,
    }  # fmt: skip
    kind = random.choice([*wrong, "key", "dict", "code", "plain pickle", "damage", "damage"])
    if kind == "damage":
        return damage_bytes(path, random)
    if kind == "code":
        with path.open("wb") as file:
            pickle.dump({key: _Runs(path.parent / "ran")}, file)
    elif kind == "plain pickle":
        with path.open("wb") as file:
            pickle.dump(tensors, file)
    elif kind == "dict":
        torch.save(random.choice([[], {}, 3, "x", [tensors], {"state_dict": tensors}, t]), path)
    else:
        if kind == "key":
            tensors[random.choice([3, None, (1, 2), b"x", 1.5])] = t
        else:
            tensors[key] = wrong[kind]
        torch.save(tensors, path)
    return f"pickle: {kind}"


def damage_folder(folder: Path, random: Random) -> str:
    """Put links and folders in the place of files, or damaged files of a tokenizer beside them."""
    there = [name for name in (CONFIG, WEIGHTS, PICKLED) if (folder / name).exists()]
    path = folder / random.choice(there)
    kind = random.choice(("loop", "dangling", "folder", "device", "pipe", "link", "tokenizer", "gone"))
    if kind == "tokenizer":
        name = random.choice(("tokenizer_config.json", "chat_template.jinja", "tokenizer.json", "chat_template.json"))
        (folder / name).write_bytes(
            random.choice(
                [
                    b"",
                    b"{",
                    b"\xff\xfe",
                    DEEP.encode(),
                    b"[]",
                    b'{"chat_template": [3]}',
                    b'{"chat_template": 3}',
                    b"{{",
                ]
            )
        )
        return f"folder: {name}"
    content = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        (folder / "elsewhere").write_bytes(content)
        path.symlink_to("elsewhere")
    elif kind != "gone":
        path.symlink_to({"loop": path.name, "dangling": "nowhere", "device": "/dev/zero"}[kind])
    return f"folder: {kind}"


def damage(folder: Path, random: Random) -> str:
    """Damage an adapter's folder in one way. Return which."""
    weights = folder / (WEIGHTS if (folder / WEIGHTS).exists() else PICKLED)
    kind = random.choices(("none", "bytes", "header", "config", "config bytes", "folder"), (1, 6, 8, 7, 2, 2))[0]
    if kind == "none":
        return "none"
    if kind == "folder":
        return damage_folder(folder, random)
    if kind == "config":
        return damage_config(folder / CONFIG, random)
    if kind == "config bytes":
        return f"config {damage_bytes(folder / CONFIG, random)}"
    if weights.name == PICKLED:
        return damage_pickle(weights, random)
    return damage_bytes(weights, random) if kind == "bytes" else damage_header(weights, random)


# --- what they should come to -----------------------------------------------------------------------------------


def meaning(folder: Path, sound: Path) -> Meaning:
    """Return ΔW of each layer by the folder's settings. `sound`: the folder whose tensors count."""
    settings = json.loads((folder / CONFIG).read_bytes())
    tensors = (
        load_file(sound / WEIGHTS) if (sound / WEIGHTS).is_file() else torch.load(sound / PICKLED, weights_only=True)
    )
    result = {}
    for key, A in tensors.items():
        if not key.endswith("lora_A.weight"):
            continue
        layer, B = (
            key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"),
            tensors[key.replace("lora_A", "lora_B")],
        )
        alpha = settings["lora_alpha"]
        scale = alpha / math.sqrt(len(A)) if settings.get("use_rslora") else alpha / len(A)
        result[layer] = scale * B.double() @ A.double()
    return result


def wrong(values: Meaning, expected: Meaning, part: bool) -> str | None:
    """Say where values are not the expected ones. `part`: settings may leave layers out, or give some another scale."""
    if not values or values.keys() - expected.keys() or (not part and values.keys() != expected.keys()):
        return f"layers {sorted(values)} for {sorted(expected)}"
    for layer, value in values.items():
        if value.shape != expected[layer].shape or not torch.allclose(value, expected[layer], rtol=1e-4, atol=1e-5):
            return f"{layer} has other values"
    return None


def product(A: Tensor, B: Tensor, scale: float) -> Tensor:
    return scale * B.detach().double() @ A.detach().double()


class Campaign:
    """The cases of one worker, on one model."""

    def __init__(self, scratch: Path) -> None:
        self.paths = seeds(scratch)
        self.base, self.other = scratch / "base", scratch / "other"
        self.models = {True: tiny(), False: tiny(1)}
        self.before = {own: self._state(model) for own, model in self.models.items()}
        self.weights = load_file(self.base / "model.safetensors")

    def __call__(self, seed: int, number: int, folder: Path) -> Outcome:
        """Run one case in an empty folder."""
        random = rng(seed, number)
        name = random.choice(list(self.paths))
        adapter = folder / "adapter"
        shutil.copytree(self.paths[name], adapter)
        sealed = not name.startswith("foreign") and name != "pickled"
        mutation = damage(adapter, random)
        own_base = random.random() < 0.9
        action = random.choice(("load", "load", "merge", "inspect", "compress", "convert", "verify"))
        label = f"{mutation}: {name}, {action}"
        try:
            values = getattr(self, f"_{action}")(adapter, folder, own_base)
        except DeltaWError:
            if mutation == "none" and own_base and action in ("load", "inspect"):
                return Outcome("silent", label, "a sound adapter was refused")
            return Outcome("changed" if (changed := self._changed(adapter, folder)) else "refused", label, changed)
        except Exception as error:
            error.add_note(label)
            raise
        changed = self._changed(adapter, folder, refused=False)
        if changed:
            return Outcome("changed", label, changed)
        if sealed and not own_base and action in ("load", "merge", "verify") and name in ("lora", "dora"):
            return Outcome("silent", label, "another base was taken")
        return Outcome(
            "silent" if (why := self._wrong(values, name, adapter, sealed, mutation)) else "right", label, why or ""
        )

    def _wrong(self, values: Meaning | None, name: str, adapter: Path, sealed: bool, mutation: str) -> str | None:
        if values is None:
            return None
        if name in ("ia3", "foreign ia3", "bitfit"):
            return self._other_wrong(values, name, mutation)
        try:
            expected = meaning(adapter, self.paths[name] if sealed else adapter)
        except Exception as error:
            return f"accepted, and the reference cannot read it: {error!r:.100}"
        settings = mutation.startswith("config")
        if settings and any(pattern in mutation for pattern in ("_pattern", "deltaw_method")):
            return None  # what a pattern means, tests hold against PEFT
        return wrong(values, expected, settings)

    def _other_wrong(self, values: Meaning, name: str, mutation: str) -> str | None:
        """Say where the values of another method are others than before; a foreign file means what it says."""
        if name.startswith("foreign") or mutation.startswith("config"):
            return None
        expected = load_file(self.paths[name] / WEIGHTS)
        plain = {
            key.removeprefix("base_model.model.").replace(".ia3_l", ".l"): tensor.flatten().double()
            for key, tensor in expected.items()
        }
        return wrong({key: value.flatten() for key, value in values.items()}, plain, False)

    def _state(self, model: Any) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def _changed(self, adapter: Path, folder: Path, *, refused: bool = True) -> str:
        """Say what is no longer as it was before the case; empty where nothing is."""
        for own, model in self.models.items():
            state = model.state_dict()
            if state.keys() != self.before[own].keys() or any(
                not torch.equal(t, self.before[own][n]) for n, t in state.items()
            ):
                self.models[own] = tiny(0 if own else 1)
                return "the model"
        left = [path.name for path in folder.iterdir() if path != adapter and (refused or path.name.startswith("."))]
        left += ["ran"] if (adapter / "ran").exists() else []
        return f"left behind: {left}" if left else ""

    def _load(self, adapter: Path, folder: Path, own_base: bool) -> Meaning:
        model = self.models[own_base]
        name = deltaw.load(model, adapter)
        try:
            values: Meaning = {}
            for layer, update in updates_of(model, name).items():
                if update.factors():
                    values[layer] = product(update.A, update.B, update.scale)
                else:
                    values |= {f"{layer}.{n}": p.detach().double() for n, p in update.named_parameters()}
            model(torch.tensor([[1, 5, 7]]))
            return values
        finally:
            deltaw.detach(model)

    def _merge(self, adapter: Path, folder: Path, own_base: bool) -> Meaning | None:
        deltaw.merge_files(self.base if own_base else self.other, adapter, folder / "out")
        if not own_base or peft.read(adapter, of_model=True).magnitudes:
            return None
        merged = load_file(folder / "out" / "model.safetensors")
        changes = {n.removesuffix(".weight"): merged[n].double() - W.double() for n, W in self.weights.items()}
        return {layer: dW for layer, dW in changes.items() if dW.any()}

    def _inspect(self, adapter: Path, folder: Path, own_base: bool) -> None:
        for flags in ([], ["--json"]):
            if (code := command_line(["inspect", str(adapter), *flags])) not in (0, None):
                if code == 1 or code > 7:
                    raise RuntimeError(f"exit code {code}")
                raise DeltaWError

    def _compress(self, adapter: Path, folder: Path, own_base: bool) -> Meaning:
        deltaw.compress(adapter, folder / "out", rank=2)
        file = peft.read(folder / "out", of_model=True)
        deltaw.compress(adapter, folder / "small", rank=1)
        return {layer: product(A, B, file.scales[layer]) for layer, (A, B) in file.factors.items()}

    def _convert(self, adapter: Path, folder: Path, own_base: bool) -> Meaning:
        deltaw.convert(adapter, folder / "out.pt", alpha=2)
        state = torch.load(folder / "out.pt", weights_only=True)
        layers = [key.removesuffix(".lora_A") for key in state if key.endswith(".lora_A")]
        return {n: product(state[f"{n}.lora_A"], state[f"{n}.lora_B"], 2 / len(state[f"{n}.lora_A"])) for n in layers}

    def _verify(self, adapter: Path, folder: Path, own_base: bool) -> None:
        verify_adapter(self.base if own_base else self.other, adapter)


def campaign(scratch: Path) -> Callable[[int, int, Path], Outcome]:
    """Return what runs a case."""
    return Campaign(scratch)
