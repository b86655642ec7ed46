"""The program as its tests see it: calls and attributes are forwarded, results are plain data."""

import builtins
import json
import os
import signal
import sys
import time
import types
from typing import Any, NoReturn

import selftaught.sandbox.messages as messages
from selftaught.sandbox.candidate import LIBRARY
from selftaught.sandbox.messages import Ended
from selftaught.sandbox.values import Decoder, Encoder, Opaque, Unsendable, Violation


class ProgramError(Exception):
    """An exception of the program that is not of a builtin class."""


def finish(result_fd: int, outcome: str, detail: str, test: int | None) -> NoReturn:
    """Write the result and end this process."""
    try:
        text = json.dumps([outcome, detail[:1000], test])
    except BaseException:
        text = json.dumps(["error", "the detail cannot be shown", test])
    os.write(result_fd, text.encode() + b"\n")
    os._exit(0)


class Remote:
    """The connection to the process of the program.

    A program that ends its process, or sends invalid data, ends the tests with the outcome `error`:
    no test can catch that.
    """

    def __init__(self, fds: tuple[int, int, int], program: int, limit: int, seconds: float) -> None:
        self.read_fd, self.write_fd, self.result_fd = fds
        self.program, self.limit, self.seconds = program, limit, seconds
        self.test: int | None = None
        """Index of the test that runs."""
        self.handles: dict[int, Handle] = {}

    def ask(self, *request: Any) -> Any:
        """Send a message and return the reply."""
        try:
            messages.send(self.write_fd, request, self.limit)
        except ValueError as error:
            finish(self.result_fd, "error", f"arguments cannot be sent: {error}", self.test)
        except OSError:
            self.ended()
        try:
            reply = messages.receive(self.read_fd, self.limit)
            if type(reply) is not list or not reply or type(reply[0]) is not str:
                raise Violation("the reply is not a list that begins with its kind")
        except (Ended, OSError):
            self.ended()
        except Violation as error:
            self.invalid(error)
        return reply

    def ended(self) -> NoReturn:
        """End the tests, because the program has ended its process or its connection."""
        for _ in range(50):
            pid, status, usage = os.wait4(self.program, os.WNOHANG)
            if pid:
                break
            time.sleep(0.01)
        else:
            finish(self.result_fd, "error", "the program closed its connection", self.test)
        code = os.waitstatus_to_exitcode(status)
        # the kernel counts the time for its limit in ticks: on a busy machine it may end early
        if code == -signal.SIGKILL and usage.ru_utime + usage.ru_stime >= 0.5 * self.seconds:
            finish(self.result_fd, "time limit", "", self.test)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        finish(self.result_fd, "error", f"the process of the program {how}", self.test)

    def invalid(self, error: Exception) -> NoReturn:
        """End the tests, because the program sent invalid data."""
        finish(self.result_fd, "error", f"the program sent invalid data: {error}", self.test)

    def request(self, kind: str, target: int, *values: Any) -> Any:
        """Send a request with values and return the value of the reply."""
        encoder = Encoder(self.opaque)
        try:
            sent = [encoder.value(value) for value in values]
        except Unsendable as problem:
            finish(self.result_fd, "error", f"arguments cannot be sent: {problem}", self.test)
        reply = self.ask(kind, target, *sent)
        try:
            if reply[0] == "value":
                _, value, changes = reply
                decoder = Decoder(self.handle, encoder.containers)
                result = decoder.value(value)
                for change in [decoder.replace(number, new) for number, new in changes]:
                    change()
                return result
            if reply[0] == "unsendable":
                error: BaseException = ProgramError(f"the result cannot be sent: {reply[1]}"[:300])
            else:
                error = self.exception(reply)
        except Exception as problem:
            self.invalid(problem)
        raise error

    def exception(self, reply: Any) -> BaseException:
        """Return the exception of this process for one that the program raised.

        SystemExit and KeyboardInterrupt stay such: an `except Exception` of a test does not catch them.
        """
        kind, names, args, text = reply
        if kind != "raised" or type(text) is not str:
            raise Violation("the reply is of an unknown kind")
        values = Decoder(self.handle).value(args)
        for name in names:
            found = getattr(builtins, name, None)
            if isinstance(found, type) and issubclass(
                found, (Exception, SystemExit, KeyboardInterrupt)
            ):
                # StopIteration would end a loop of the tests early
                if issubclass(found, (StopIteration, StopAsyncIteration)):
                    break
                if found is Exception and name != names[0]:
                    return ProgramError(*values)
                try:
                    return found(*values)
                except TypeError:
                    continue
        return ProgramError(text[:300])

    def names(self, used: set[str]) -> dict[str, Any]:
        """Return what the program defines, of the names that the tests use."""
        try:
            kind, defined = self.ask("names")
            wanted = sorted(name for name in used & set(defined) if not name.startswith("__"))
            found = {name: self.ask("name", name) for name in wanted}
            if kind != "names":
                raise Violation("expected names")
            return {name: self.named(name, *reply) for name, reply in found.items()}
        except Exception as problem:
            self.invalid(problem)

    def named(self, name: str, kind: str, value: Any) -> Any:
        """Return one name of the program. Modules of the library are those of this process."""
        if kind == "module" and value in LIBRARY:
            return sys.modules[value]
        if kind == "library" and value in LIBRARY and not name.startswith("_"):
            return getattr(sys.modules[value], name)
        if kind != "value":
            raise Violation(f"{name} is of an unknown kind")
        return Decoder(self.handle).value(value)

    def handle(self, tag: str, *rest: Any) -> "Handle":
        """Return the handle of a number."""
        (number,) = rest
        if tag not in ("handle", "match") or type(number) is not int:
            raise Violation("unknown tag")
        if number not in self.handles:
            self.handles[number] = (Handle if tag == "handle" else Match)(self, number)
        return self.handles[number]

    def opaque(self, value: Any) -> list[Any]:
        """Encode an argument that is not data: an object of the program, or a builtin function."""
        if type(value) in (Handle, Match):
            return ["handle", object.__getattribute__(value, "_number")]
        if isinstance(value, (type, types.BuiltinFunctionType)):
            name = value.__name__
            for module in ("builtins", *LIBRARY):
                if vars(sys.modules[module]).get(name) is value:
                    return ["global", module, name]
        raise Unsendable(f"a value of type {type(value).__name__} cannot be sent to the program")


def _refuse(self: "Handle", *_: Any) -> NoReturn:
    """End the tests: a comparison would let the program decide about a test."""
    remote = object.__getattribute__(self, "_remote")
    detail = "an object of a class of the program was compared, counted or used as a condition"
    finish(remote.result_fd, "error", detail, remote.test)


class Handle(Opaque):
    """A function, class or other object of the program.

    Calls, attributes and items are forwarded. What would let the program decide about a test, such
    as a comparison, ends the tests with the outcome `error`.
    """

    __slots__ = ("_number", "_remote")

    def __init__(self, remote: Remote, number: int) -> None:
        object.__setattr__(self, "_remote", remote)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._remote.request("call", self._number, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__qualname__", "__doc__"):
            raise AttributeError(name)
        return self._remote.request("get", self._number, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._remote.request("set", self._number, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._remote.request("item", self._number, key)

    def __str__(self) -> str:
        return self._text("str")

    def __repr__(self) -> str:
        return self._text("repr")

    def _text(self, kind: str) -> str:
        text = self._remote.request("text", self._number, kind)
        if type(text) is not str:
            raise TypeError("the program returned a text that is not a string")
        return text

    __hash__ = object.__hash__


for _name in (
    "eq", "ne", "lt", "le", "gt", "ge", "bool", "len", "contains", "iter", "next", "reversed",
    "length_hint", "index", "int", "float", "complex", "reduce_ex", "instancecheck",
    "subclasscheck",
):  # fmt: skip
    setattr(Handle, f"__{_name}__", _refuse)


class Match(Handle):
    """A match of a regular expression, which is true as a condition."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return True
