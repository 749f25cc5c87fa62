"""Settings as plain values and back; every mistake in one error, each with its place and the nearest valid name."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deltaw.config as module
from deltaw import DataConfig, GenerateConfig, LoRA, TrainConfig
from deltaw.config import check_is, from_mapping, keys, read_yaml, to_mapping, to_yaml
from deltaw.errors import ConfigError

CONFIGS = (DataConfig, TrainConfig, GenerateConfig, LoRA)
positive = st.floats(1e-8, 1e3, allow_nan=False)
some = st.integers(1, 10_000)

data_configs = st.builds(
    DataConfig,
    form=st.sampled_from(["auto", "prompt", "chat", "instruction", "text"]),
    template=st.sampled_from(["auto", "chat", "plain"]),
    separator=st.text(max_size=5),
    system=st.none() | st.text(max_size=20),
    max_length=st.integers(2, 10_000),
    max_records=st.none() | some,
)
train_configs = st.builds(
    TrainConfig,
    data=data_configs, out=st.text(min_size=1, max_size=20), overwrite=st.booleans(), lr=positive, warmup=positive,
    schedule=st.sampled_from(["cosine", "linear", "constant"]), epochs=positive, steps=st.none() | some, batch=some,
    clip=positive, seed=st.integers(-(2**63) + 1, 2**63 - 1), valid=st.none() | st.text(max_size=9), patience=st.none() | some,
)  # fmt: skip


@given(train_configs)
def test_to_mapping_and_from_mapping_are_inverse(config: TrainConfig) -> None:
    assert from_mapping(TrainConfig, to_mapping(config)) == config


@given(train_configs)
def test_a_config_survives_yaml(config: TrainConfig) -> None:
    import yaml

    assert from_mapping(TrainConfig, yaml.safe_load(to_yaml(to_mapping(config)))) == config


@given(
    st.dictionaries(st.text(max_size=12), st.none() | st.booleans() | st.integers() | st.text(max_size=8), max_size=6)
)
def test_any_mapping_gives_a_config_or_a_config_error(values: dict[str, Any]) -> None:
    try:
        config = from_mapping(TrainConfig, values)
    except ConfigError:
        return
    assert all(to_mapping(config)[key] == value for key, value in values.items())


def test_the_flat_keys_of_a_training_command_do_not_collide() -> None:
    flat = [k for cls in (DataConfig, LoRA) for k in keys(cls)]
    flat += [f.name for f in dataclasses.fields(TrainConfig) if f.name != "data"]
    assert len(flat) == len(set(flat))


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_field_says_what_it_is(cls: type) -> None:
    """Field docstrings are the command line's help: a field without one would have none."""
    body = next(n for n in ast.parse(inspect.getsource(cls)).body if isinstance(n, ast.ClassDef)).body
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) != "data":
            assert isinstance(following, ast.Expr), f"{cls.__name__}.{ast.unparse(node.target)} has no text under it"


def test_an_unknown_key_names_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"run.yaml: unknown key 'schedul' \(did you mean 'schedule'"):
        from_mapping(TrainConfig, {"schedul": "linear"}, where="run.yaml")


def test_all_problems_come_in_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(TrainConfig, {"lr": "fast", "btach": 4, "epochs": -1, "max_length": "long", "schedule": "cosin"})
    text = str(caught.value)
    for part in ("lr is 'fast'", "'btach'", "'batch'", "epochs is -1", "max_length is 'long'", "schedule is 'cosin'"):
        assert part in text, part


def test_a_missing_key_is_named() -> None:
    @dataclasses.dataclass(frozen=True)
    class Command:
        model: str
        run: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    with pytest.raises(ConfigError) as caught:
        from_mapping(Command, {"batch": 0}, where="c.yaml")
    assert caught.value.problems == ["c.yaml: model is missing", "batch is 0; it must be at least 1"]


def test_a_type_is_named_in_words() -> None:
    with pytest.raises(ConfigError, match="targets is 5; it must be text or a list or a mapping of names to numbers"):
        LoRA(targets=5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"schedule is 'cosin'; .* \(did you mean 'cosine'\?\)"):
        from_mapping(TrainConfig, {"schedule": "cosin"})


def test_numbers_as_yaml_reads_them() -> None:
    # YAML 1.1 reads 5e-4 (no point) as a string
    assert from_mapping(TrainConfig, {"lr": "5e-4", "epochs": 3}) == TrainConfig(lr=5e-4, epochs=3)
    for wrong in ({"batch": 2.5}, {"batch": True}, {"batch": "8"}, {"overwrite": 1}, {"batch": None}):
        with pytest.raises(ConfigError):
            from_mapping(TrainConfig, wrong)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TrainConfig(lr=-1.0),
        lambda: TrainConfig(lr=0.0),
        lambda: TrainConfig(minutes=0),
        lambda: TrainConfig(epochs=0),
        lambda: TrainConfig(warmup=float("inf")),
        lambda: TrainConfig(steps=1.5),  # type: ignore[arg-type]
        lambda: TrainConfig(overwrite="no"),  # type: ignore[arg-type]
        lambda: TrainConfig(data=None),  # type: ignore[arg-type]
        lambda: TrainConfig(lr=float("nan")),
        lambda: TrainConfig(batch=0),
        lambda: TrainConfig(batch=4, micro_batch=5),
        lambda: TrainConfig(valid_share=0.9),
        lambda: TrainConfig(schedule="step"),  # type: ignore[arg-type]
        lambda: DataConfig(max_length=1),
        lambda: DataConfig(form="alpaca"),  # type: ignore[arg-type]
        lambda: GenerateConfig(top_p=1.5),
        lambda: GenerateConfig(beams=0),
        lambda: LoRA(rank=0),
        lambda: LoRA(rank=2.5),  # type: ignore[arg-type]
        lambda: LoRA(alpha=0),
        lambda: LoRA(alpha=float("inf")),
        lambda: LoRA(targets=5),  # type: ignore[arg-type]
        lambda: LoRA(dropout=1.5),
    ],
)
def test_values_out_of_range_are_refused_where_they_are_made(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


def test_the_right_value_in_another_guise_is_made_plain() -> None:
    config = TrainConfig(out=Path("runs") / "a", batch=np.int64(4), lr=np.float32(0.5), steps=10.0)  # type: ignore[arg-type]
    assert config == TrainConfig(out="runs/a", batch=4, lr=0.5, steps=10)
    assert type(config.batch) is int and type(config.lr) is float and type(config.out) is str


def test_config_imports_no_torch() -> None:
    """`deltaw --help` derives its flags from it and must answer at once."""
    imported = {
        n.name
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Import)
        for n in node.names
    }
    assert not imported & {"torch", "transformers"}


@pytest.mark.parametrize("text", ["rank: 4\nrank: 8\n", "lr: 1e-3\ntargets: {q: 1, q: 2}\n"])
def test_a_key_that_stands_twice_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match="more than once: leave one"):
        read_yaml(tmp_path / "c.yaml")


def test_a_file_of_settings_that_is_not_there_or_a_folder_is_told_plainly(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "no.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=f"cannot be read: {why}"):
            read_yaml(path)


def test_arguments_of_another_class_are_told_with_the_right_one() -> None:
    for value, hint in (({"lr": 1}, r"TrainConfig\(\*\*config\)"), ("lora", "a TrainConfig")):
        with pytest.raises(ConfigError, match=f"config is .*: give {hint}"):
            check_is(value, TrainConfig, "config")
