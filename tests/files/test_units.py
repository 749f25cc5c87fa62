import pytest

from deltaw.errors import ConfigError
from deltaw.files.units import duration, parse_size, size


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


def test_sizes_are_read_as_people_write_them() -> None:
    assert [parse_size(t, "x") for t in ("16GB", "16 GiB", "900MB", "1.5k", "12")] == [
        16 * 10**9, 16 * 2**30, 9 * 10**8, 1500, 12
    ]  # fmt: skip
    for wrong in ("", "GB", "0", "-1GB", "1XB", "1e9"):
        with pytest.raises(ConfigError, match="x is"):
            parse_size(wrong, "x")
