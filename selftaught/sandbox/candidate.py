"""The process that runs an untrusted program and answers calls to it.

Nothing that this process sends is trusted. The functions here make honest programs work; a hostile
program can replace all of them, and can then do no more than return other values.
"""

import json
import re
import sys
import traceback
import types
from collections.abc import Iterator
from typing import Any

import selftaught.sandbox.messages as messages
from selftaught.sandbox.messages import Ended
from selftaught.sandbox.values import Decoder, Encoder, Unsendable

LIBRARY = (
    "math", "cmath", "re", "collections", "itertools", "functools", "heapq", "bisect", "operator",
    "string", "random", "datetime", "copy", "json", "typing", "decimal", "fractions", "statistics",
    "sys", "array",
)  # fmt: skip
"""Modules of the standard library that tests may use where the program imports them."""


class Server:
    """Runs one program and answers the messages of its tests."""

    def __init__(self, read_fd: int, write_fd: int, limit: int) -> None:
        self.read_fd, self.write_fd, self.limit = read_fd, write_fd, limit
        self.module = types.ModuleType("program")
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}

    def serve(self) -> None:
        """Answer messages until the tests have ended."""
        while True:
            try:
                request = messages.receive(self.read_fd, self.limit)
            except Ended:
                return
            try:
                reply = getattr(self, f"do_{request[0]}")(*request[1:])
            except Unsendable as error:
                reply = ["unsendable", str(error)[:300]]
            except BaseException as error:
                reply = self.raised(error)
            try:
                messages.send(self.write_fd, reply, self.limit)
            except (ValueError, RecursionError, MemoryError) as error:
                messages.send(self.write_fd, ["unsendable", str(error)[:300]], self.limit)

    def raised(self, error: BaseException) -> list[Any]:
        """Return the message for an exception: names of its classes, arguments and text."""
        names = [kind.__name__ for kind in type(error).__mro__]
        try:
            arguments = Encoder(self.handle).value(error.args)
        except BaseException:
            arguments = ["tuple"]
        try:
            text = "".join(traceback.format_exception_only(error)).strip()
        except BaseException:
            text = names[0]
        return ["raised", names, arguments, text[-300:]]

    def do_load(self, code: str) -> list[Any]:
        """Run the program."""
        sys.modules["program"] = self.module
        exec(compile(code, "<program>", "exec"), vars(self.module))
        return ["loaded"]

    def do_names(self) -> list[Any]:
        """Return the names that the program defines."""
        return ["names", [name for name in vars(self.module) if type(name) is str]]

    def do_name(self, name: str) -> list[Any]:
        """Return one name of the program: a module, a part of the library, or a value."""
        value = getattr(self.module, name)
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        if callable(value):
            for module in LIBRARY:
                if module in sys.modules and vars(sys.modules[module]).get(name) is value:
                    return ["library", module]
        if isinstance(value, Iterator):
            return ["value", self.handle(value)]  # is not consumed
        try:
            return ["value", Encoder(self.handle).value(value)]
        except Unsendable:
            return ["value", self.handle(value)]

    def do_call(self, target: int, args: Any, kwargs: Any) -> list[Any]:
        """Call an object."""
        decoder = self.decoder()
        args, kwargs = decoder.value(args), decoder.value(kwargs)
        containers = decoder.containers
        before = [self.state(item, containers) for item in containers]
        result = self.objects[target](*args, **kwargs)
        encoder = Encoder(self.handle, containers)
        value = encoder.value(result)
        changes = [
            [number, encoder.contents(item)]
            for number, item in enumerate(containers)
            if self.state(item, containers) != before[number]
        ]
        return ["value", value, changes]

    def state(self, container: Any, containers: list[Any]) -> str:
        """Return the contents of a container as text, to find changes; iterators are not read.

        As JSON, the equal numbers 1, 1.0 and True differ.
        """
        encoder = Encoder(self.handle, containers, read_iterators=False)
        return json.dumps(encoder.contents(container))

    def do_get(self, target: int, name: str) -> list[Any]:
        """Return an attribute of an object."""
        return self.plain(getattr(self.objects[target], name))

    def do_set(self, target: int, name: str, value: Any) -> list[Any]:
        """Set an attribute of an object."""
        setattr(self.objects[target], name, self.decoder().value(value))
        return self.plain(None)

    def do_item(self, target: int, key: Any) -> list[Any]:
        """Return an item of an object."""
        return self.plain(self.objects[target][self.decoder().value(key)])

    def do_text(self, target: int, kind: str) -> list[Any]:
        """Return `str` or `repr` of an object."""
        return self.plain({"str": str, "repr": repr}[kind](self.objects[target]))

    def plain(self, value: Any) -> list[Any]:
        """Return the message for a value."""
        return ["value", Encoder(self.handle).value(value), []]

    def decoder(self) -> Decoder:
        """Return a decoder of values that the tests send."""
        return Decoder(self.known)

    def known(self, tag: str, *rest: Any) -> Any:
        """Return the object of this process that the tests refer to."""
        if tag in ("handle", "match"):
            return self.objects[rest[0]]
        module, name = rest
        return getattr(sys.modules[module], name)

    def handle(self, value: Any) -> list[Any]:
        """Return the number of an object, a new one for a new object, with its tag."""
        number = self.numbers.get(id(value))
        if number is None:
            number = self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return ["match" if type(value) is re.Match else "handle", number]
