"""Programs to be tested, their results and their limits."""

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["right", "wrong", "error", "time limit", "refused"]


@dataclass(frozen=True)
class Program:
    """An untrusted program with its tests."""

    code: str
    """The untrusted program: source of a module."""
    tests: tuple[str, ...]
    """Tests: each one is a block of statements, such as `assert f(1) == 2`."""
    setup: str = ""
    """Trusted code that runs before the tests. It sees the names of the program."""
    entry: tuple[str, ...] = ()
    """Names that the tests always take from the program, even where a builtin function, a standard
    module or `setup` has the same name."""


@dataclass(frozen=True)
class Result:
    """The result of a program."""

    outcome: Outcome
    """`right`: every test passed. `wrong`: an assertion failed. `error`: another exception, or the
    program ended its process or sent invalid data. `refused`: the program was not run, or its tests
    cannot be: they are not valid Python, or `setup` imports what is not there."""
    detail: str = ""
    """The assertion or exception: printable, one line, at most 300 characters."""
    test: int | None = None
    """Index of the first test that failed. None if all passed or no test was run."""


@dataclass(frozen=True)
class Limits:
    """Limits of one program. Test process and program process have the same limits."""

    seconds: float = 5.0
    """CPU time of each process, rounded up to whole seconds."""
    wall_seconds: float | None = None
    """Wall-clock time of the program with its tests. Default: twice `seconds`, because programs
    wait for each other on a busy machine."""
    memory_bytes: int = 512 * 2**20
    """Address space of each process."""
    processes: int = 8
    """Processes and threads of the program and its tests together. In the mode `process`, no
    further processes can be started."""
    file_bytes: int = 16 * 2**20
    """Size of each file, and of all files together in the mode `namespaces`."""
    message_bytes: int = 16 * 2**20
    """Size of the arguments or the result of one call, encoded as JSON."""
    source_characters: int = 100_000
    """Length of the source of a program. Longer ones are refused."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value <= 0:
                raise ValueError(f"Expected {name} above 0, got {value}.")

    @property
    def wall(self) -> float:
        """Wall-clock time of a program in seconds."""
        return self.wall_seconds or 2 * self.seconds
