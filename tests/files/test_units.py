import pytest

from deltaw.files.units import duration, size


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (9_800_000, "9.8 MB"), (538_100_000, "538.1 MB"), (1.2e15, "1200.00 TB")],
)
def test_size(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.21, "4.2 s"), (59.97, "60.0 s"), (187, "3 min 07 s"), (3599.6, "1 h 00 min"), (3725, "1 h 02 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
