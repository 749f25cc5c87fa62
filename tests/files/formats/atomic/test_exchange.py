"""A folder in another one's place: in one step, or in two that nothing can come between."""

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deltaw.files.formats.atomic.exchange import exchange, take_place, unbroken

Exchange = Callable[[Path, Path], bool]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("new.tmp", "place"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    return tmp_path / "new.tmp", tmp_path / "place"


def contents(*folders: Path) -> list[str]:
    return [(folder / "file").read_text() for folder in folders]


def refused(one: Path, other: Path) -> bool:
    return False


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="a system without an exchange")
def test_two_folders_are_exchanged(folders: tuple[Path, Path], tmp_path: Path) -> None:
    if not exchange(*folders):
        pytest.skip("a file system without an exchange")
    assert contents(*folders) == ["place", "new.tmp"]
    assert not exchange(folders[0], tmp_path / "none") and contents(*folders) == ["place", "new.tmp"]


@pytest.mark.parametrize("exchange", [exchange, refused])
def test_the_new_folder_is_there_and_the_old_one_has_its_name(exchange: Exchange, folders: tuple[Path, Path]) -> None:
    take_place(*folders, exchange)
    assert contents(*folders) == ["place", "new.tmp"] and len(list(folders[0].parent.iterdir())) == 2


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Let Ctrl-C interrupt this process, also where it was started to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("answer", [True, False])
def test_ctrl_c_waits_until_the_folder_is_in_its_place(answer: bool, folders: tuple[Path, Path]) -> None:
    def interrupted(one: Path, other: Path) -> bool:
        signal.raise_signal(signal.SIGINT)
        return answer and exchange(one, other)

    with pytest.raises(KeyboardInterrupt):
        take_place(*folders, interrupted)
    assert contents(*folders) == ["place", "new.tmp"]


def test_where_the_new_one_cannot_be_renamed_the_old_one_is_back(
    folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    def gone(one: Path, other: Path) -> bool:
        one.rename(one.with_name("elsewhere"))
        return False

    with pytest.raises(FileNotFoundError):
        take_place(*folders, gone)
    assert contents(folders[1]) == ["place"]
    assert "place stands aside as" in caplog.text and "is back in its place" in caplog.text


def test_a_signals_own_handler_is_back_and_gets_it() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with unbroken():
            signal.raise_signal(signal.SIGTERM)
            assert not came
        assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
