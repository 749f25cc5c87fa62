"""adapter_config.json as one value: settings by their types, kept as they were written."""

import dataclasses

import pytest

from deltaw.files.formats.peft.config import READ, PeftConfig, setting_problems

GOOD: dict[str, object] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


def test_every_setting_that_is_read_is_a_field() -> None:
    assert {field.name for field in dataclasses.fields(PeftConfig)} >= READ


def test_settings_that_are_no_fields_are_kept() -> None:
    config = PeftConfig.of({**GOOD, "something_new": 3}).changed(r=4)
    assert config.settings == {**GOOD, "something_new": 3, "r": 4} and config.r == 4


@pytest.mark.parametrize(("written", "read"), [(8, 8), (8.0, 8)])
def test_a_whole_rank_is_read_however_it_was_written(written: float, read: int) -> None:
    settings = {**GOOD, "r": written, "rank_pattern": {"q": written}}
    config = PeftConfig.of(settings)
    assert not setting_problems(settings) and (config.r, config.rank_pattern) == (read, {"q": read})
    assert isinstance(config.r, int) and isinstance(config.rank_pattern["q"], int)


@pytest.mark.parametrize("wrong", [0, -1, 4.5, True, "8", None, float("nan"), 10**400], ids=lambda w: str(w)[:9])
def test_what_is_no_rank_is_named(wrong: object) -> None:
    problems = setting_problems({**GOOD, "r": wrong, "rank_pattern": {"q": wrong}})
    assert [p.split(" is ")[0] for p in problems] == [
        "adapter_config.json: r",
        "adapter_config.json: rank_pattern['q']",
    ]


@pytest.mark.parametrize("wrong", [0, -0.5, "16", float("inf"), 10**400], ids=lambda w: str(w)[:9])
def test_what_is_no_alpha_is_named(wrong: object) -> None:
    (problem,) = setting_problems({**GOOD, "lora_alpha": wrong})
    assert problem.startswith("adapter_config.json: lora_alpha is") and problem.endswith("must be a number above 0")
