"""A bounded part of the fuzz campaign (benchmarks/fuzz.py): each case is read right, or refused by one error."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(("module", "count"), [("fuzz_adapters", 30), ("fuzz_data", 100)])
@pytest.mark.filterwarnings("ignore")
def test_no_damage_is_taken_for_whole(module: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    case = __import__(module).campaign(tmp_path / "scratch")
    results = set()
    for number in range(count):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcome = case(1, number, folder)
        assert outcome.result in ("right", "refused"), (number, outcome)
        results.add(outcome.result)
    assert results == {"right", "refused"}
