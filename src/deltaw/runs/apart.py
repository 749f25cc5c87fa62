"""Parts of a comparison in processes of their own: a peak of memory is a process's, and one that breaks down takes nothing along.

    python -m deltaw.runs.apart      # a server: a line of JSON for each part, answered by two lines, its number and its code

To import what a part needs takes seconds, often more than the part itself. So on Linux one process imports it, and each part is
a fork of that. Elsewhere, and with a GPU, whose driver survives no fork, each part is a new process.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Protocol

from deltaw import progress
from deltaw.errors import Interrupted, TrainError
from deltaw.runs import worker
from deltaw.runs.resume.signals import asked_to_stop, end_with_the_parent

# Seconds between two looks at a process
_LOOK_EVERY = 0.2
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Process(Protocol):
    """A part at work."""

    def send(self, signum: int) -> None:
        """Send it a signal."""

    def ended(self, seconds: float) -> int | None:
        """Wait so long at most. Return its exit code, as `Popen.returncode` has it; None while it is at work."""


class Processes:
    """The processes of one comparison."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.communicate()  # it ends with its input

    def do(self, part: str, folder: Path, result: str) -> None:
        """Do a part in a process, to its end. What it prints goes to FOLDER/output.txt.

        A signal that asks this process to end is passed on, so that the part saves its state.

        part: as `worker` takes it. result: the file that it leaves in the folder. Raises Interrupted where it was asked to end,
        and TrainError where the process ended without a result.
        """
        (folder / result).unlink(missing_ok=True)  # one of other settings
        said = folder / "output.txt"
        with asked_to_stop() as stopping:
            process = self._begun(part, folder, said)
            passed_on = False
            now = _Now(folder / worker.NOW)
            while (code := process.ended(_LOOK_EVERY)) is None:
                now.pass_on()
                if stopping() and not passed_on:
                    process.send(stopping.signum)
                    passed_on = True
        if stopping():
            raise Interrupted("Stopped. The same command goes on from there.", exit_code=stopping.exit_code)
        if code < 0 or not (folder / result).is_file():
            raise TrainError(f"The {part} ended with {code} and no result; what it said is in {said}.")

    def _begun(self, part: str, folder: Path, said: Path) -> Process:
        if not _can_fork():
            return _New(part, folder, said)
        if self._server is None or self._server.poll() is not None:
            with said.open("wb") as output:
                words = [sys.executable, "-m", __name__]
                self._server = _started(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output)
        return _Forked(self._server, part, folder, said)


class _Now:
    """The file in which a part tells what it is doing."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._path = path
        self._last = b""

    def pass_on(self) -> None:
        """Tell whoever watches this call of a notice that is new."""
        if not progress.is_watched():
            return
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = self._path.read_bytes()
            if content != self._last:
                self._last = content
                progress.tell(progress.from_json(json.loads(content)))


def _can_fork() -> bool:
    """Return whether parts can be forks."""
    import torch

    return sys.platform == "linux" and not torch.cuda.is_available()


def _started(words: list[str], **files: object) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own: a terminal's Ctrl-C would else reach it twice. Its pipes have no buffer here."""
    env = os.environ | _QUIET | _same_imports()
    return subprocess.Popen(words, env=env, start_new_session=True, bufsize=0, **files)  # type: ignore[call-overload, no-any-return]


def _same_imports() -> dict[str, str]:
    """Return the variables by which a process imports from where this one does.

    `python -m` alone would import from the working folder first: a file json.py in it, which may be a stranger's, would run.
    """
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if os.pathsep not in path)}


class _New:
    """A part in a new process."""

    def __init__(self, part: str, folder: Path, said: Path) -> None:
        with said.open("wb") as output:
            words = [sys.executable, "-m", worker.__name__, part, str(folder)]
            self._process = _started(words, stdout=output, stderr=subprocess.STDOUT)

    def send(self, signum: int) -> None:
        self._process.send_signal(signum)

    def ended(self, seconds: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None


class _Forked:
    """A part in a fork of the server."""

    def __init__(self, server: subprocess.Popen[bytes], part: str, folder: Path, said: Path) -> None:
        assert server.stdin is not None and server.stdout is not None
        self._server, self._answers = server, server.stdout
        asked = {"part": part, "folder": str(folder.resolve()), "said": str(said.resolve()), "place": str(Path.cwd())}
        with contextlib.suppress(BrokenPipeError):
            server.stdin.write(json.dumps(asked).encode() + b"\n")
        answer = self._answers.readline()
        self._pid = int(answer) if answer else None

    def send(self, signum: int) -> None:
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signum)

    def ended(self, seconds: float) -> int | None:
        if self._pid is not None and not select.select([self._answers], [], [], seconds)[0]:
            return None
        answer = self._answers.readline()
        return int(answer) if answer else -(self._server.wait() or signal.SIGKILL)  # the server itself has broken down


# --- the server ---------------------------------------------------------------------------------------------------


def serve() -> None:
    """Fork a process for each part that is asked for, one after another, until there is no more input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_the_parent()
    answers = os.dup(1)
    os.dup2(2, 1)  # what is printed while importing is no answer
    worker.imported()
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if not pid:
            _be(asked, answers)
        os.write(answers, f"{pid}\n".encode())
        os.write(answers, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())


def _be(asked: dict[str, str], answers: int) -> None:
    """Do a part in this fork, and end it."""
    code = 1
    try:
        os.close(answers)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        end_with_the_parent()
        os.chdir(asked["place"])
        output = os.open(asked["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = worker.main(asked["part"], Path(asked["folder"]))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
