"""Values as tagged JSON: the data that a program and its tests exchange.

None, booleans, integers below 2**63, finite floats and strings are their JSON values. Every other
value is a JSON list that begins with a tag. Decoding builds plain values of builtin types only and
never calls anything that the sender names. Lists, dictionaries and other mutable containers are
numbered in the order in which they are met; a container that is met again is a reference to its
number, so that shared and circular structure is kept and changes in place can be sent back.
"""

import array
import datetime
import itertools
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from decimal import Decimal
from fractions import Fraction
from typing import Any

DEPTH = 150
"""Maximum nesting of containers."""
NODES = 2_000_000
"""Maximum number of values in a message."""
ITEMS = 100_000
"""Maximum number of items that are taken from an iterator."""

TYPES = {
    kind.__name__: kind
    for kind in (
        bool, bytearray, bytes, complex, dict, float, frozenset, int, list, object, range, set, slice,
        str, tuple, type, type(None),
    )
}  # fmt: skip
"""Builtin types that can be sent as values, by name."""
MUTABLE: dict[type, str] = {
    list: "list", dict: "dict", set: "set", deque: "deque", bytearray: "bytearray",
    OrderedDict: "ordered", Counter: "counter", defaultdict: "dict", array.array: "array",
}  # fmt: skip
"""Tags of mutable containers. A defaultdict arrives as a dict."""
TIMES = {
    kind.__name__: kind
    for kind in (datetime.date, datetime.datetime, datetime.time, datetime.timedelta)
}


class Unsendable(TypeError):
    """A value that cannot be sent, or is too large."""


class Violation(ValueError):
    """A message that does not follow the format."""


class Opaque:
    """Base class of values that are never data, whatever methods they have."""

    __slots__ = ()


class Encoder:
    """Encodes the values of one message.

    Args:
        opaque: Encodes a value that is not data, or raises `Unsendable`.
        containers: Containers that the receiver already has, in the order of their numbers.
        read_iterators: Encode an iterator as its items. False: only say which one it is.
    """

    def __init__(
        self,
        opaque: Callable[[Any], Any],
        containers: list[Any] | None = None,
        *,
        read_iterators: bool = True,
    ) -> None:
        self.opaque = opaque
        self._read_iterators = read_iterators
        self.containers = list(containers or ())
        self._numbers = {id(container): n for n, container in enumerate(self.containers)}
        self._nodes = 0
        self._alive: list[Any] = []  # an id is not used again while its object lives

    def value(self, value: Any, depth: int = 0) -> Any:
        """Return a value as JSON."""
        kind = type(value)
        self._nodes += 1
        if value is None or kind is bool:
            return value
        if kind is str:
            return _text(value)
        if kind is int:
            return value if -(2**63) <= value < 2**63 else ["int", f"{value:x}"]
        if kind is float:
            return value if math.isfinite(value) else ["float", repr(value)]
        if self._nodes > NODES:
            raise Unsendable(f"a value has more than {NODES:,} parts")
        if depth > DEPTH:
            raise Unsendable(f"a value is nested more than {DEPTH} levels deep")
        if (encode := _SCALARS.get(kind)) is not None:
            return encode(value)
        if kind in MUTABLE:
            number = self._numbers.get(id(value))
            if number is not None:
                return ["ref", number]
            self._numbers[id(value)] = len(self.containers)
            self.containers.append(value)
            return self.contents(value, depth)
        if kind is tuple or kind is frozenset:
            return [kind.__name__, *(self.value(item, depth + 1) for item in value)]
        return self._other(value, kind, depth)

    def contents(self, container: Any, depth: int = 0) -> Any:
        """Return a mutable container as JSON, even if the receiver already has it."""
        kind = type(container)
        tag = MUTABLE[kind]
        if kind is bytearray:
            return [tag, container.hex()]
        if kind in (list, set):
            return [tag, *[self.value(item, depth + 1) for item in container]]
        if kind is deque:
            return [tag, container.maxlen, *[self.value(item, depth + 1) for item in container]]
        if kind is array.array:
            return [tag, container.typecode, *[self.value(item, depth + 1) for item in container]]
        pairs = itertools.chain.from_iterable(container.items())
        return [tag, *[self.value(item, depth + 1) for item in pairs]]

    def _other(self, value: Any, kind: type, depth: int) -> Any:
        """Return a subclass of a builtin type as its plain value, an iterator as its items."""
        if issubclass(kind, Opaque):
            return self.opaque(value)
        if kind is type and TYPES.get(value.__name__) is value:
            return ["type", value.__name__]
        if issubclass(kind, _VIEWS):
            tag = next(tag for base, tag in _VIEW_TAGS.items() if issubclass(kind, base))
            return [tag, *[self.value(item, depth + 1) for item in value]]
        for base, plain in _PLAIN.items():
            if issubclass(kind, base):
                copy = plain(value)
                self._alive.append(copy)
                return self.value(copy, depth)
        if issubclass(kind, Iterator):
            if not self._read_iterators:
                return ["iterator", id(value)]
            items = list(itertools.islice(value, ITEMS + 1))
            if len(items) > ITEMS:
                raise Unsendable(f"an iterator has more than {ITEMS:,} items")
            return ["iterator", *[self.value(item, depth + 1) for item in items]]
        return self.opaque(value)


def _text(value: str) -> Any:
    # JSON joins two surrogates that are separate characters in Python
    if value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value):
        return value
    return ["str", *map(ord, value)]


def _time(value: Any) -> Any:
    if type(value) is datetime.timedelta:
        return ["timedelta", value.days, value.seconds, value.microseconds]
    if getattr(value, "tzinfo", None) is not None:
        raise Unsendable("a time with a time zone cannot be sent")
    return [type(value).__name__, value.isoformat()]


_SCALARS: dict[type, Callable[[Any], Any]] = {
    bytes: lambda value: ["bytes", value.hex()],
    complex: lambda value: ["complex", repr(value.real), repr(value.imag)],
    range: lambda value: ["range", *map(hex, (value.start, value.stop, value.step))],
    Decimal: lambda value: ["decimal", str(value)],
    Fraction: lambda value: ["fraction", hex(value.numerator), hex(value.denominator)],
    **dict.fromkeys(TIMES.values(), _time),
}
_VIEW_TAGS: dict[type, str] = {KeysView: "keys", ValuesView: "values", ItemsView: "items"}
_VIEWS = tuple(_VIEW_TAGS)
_PLAIN: dict[type, Callable[[Any], Any]] = {
    int: int.__int__,
    float: float.__float__,
    str: lambda value: str.__getitem__(value, slice(None)),
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
    tuple: lambda value: tuple(tuple.__iter__(value)),
    list: lambda value: list(list.__iter__(value)),
    set: lambda value: set(set.__iter__(value)),
    frozenset: lambda value: set(frozenset.__iter__(value)),
    dict: lambda value: dict(dict.items(value)),
}
"""Conversions of a subclass to the builtin type, which do not call methods of the subclass."""


class Decoder:
    """Decodes the values of one message and checks them.

    Args:
        opaque: Returns the object of a number that the sender uses for something that is not data.
        containers: Containers that the sender already has, in the order of their numbers.
    """

    def __init__(self, opaque: Callable[[str, Any], Any], containers: list[Any] | None = None):
        self.opaque = opaque
        self.containers = list(containers or ())

    def value(self, message: Any) -> Any:
        """Return the value of a JSON message.

        Raises:
            Violation: the message does not follow the format.
        """
        try:
            return self._value(message)
        except Violation:
            raise
        except Exception as error:
            raise Violation(f"invalid value: {type(error).__name__}: {error}"[:200]) from None

    def replace(self, number: Any, message: Any) -> Callable[[], None]:
        """Return a function that replaces the contents of a known container."""
        if type(number) is not int or not 0 <= number < len(self.containers):
            raise Violation("reference to an unknown container")
        container = self.containers[number]
        try:
            if MUTABLE[type(container)] != message[0]:
                raise Violation("contents of another type")
            new = self._container(message[0], message[1:], register=False)
        except Violation:
            raise
        except Exception as error:
            raise Violation(f"invalid contents: {type(error).__name__}"[:200]) from None
        return lambda: _refill(container, new)

    def _value(self, message: Any) -> Any:
        if message is None or type(message) in (bool, int, str, float):
            return message
        if type(message) is not list or not message or type(message[0]) is not str:
            raise Violation("expected a list that begins with a tag")
        tag, *rest = message
        if tag in _TAGS:
            return self._container(tag, rest, register=True)
        if tag == "tuple":
            return tuple([self._value(item) for item in rest])
        if tag == "frozenset":
            return frozenset([self._value(item) for item in rest])
        if tag == "iterator":
            return iter([self._value(item) for item in rest])
        if tag in ("keys", "values", "items"):
            items = [self._value(item) for item in rest]
            if tag == "keys":
                return dict.fromkeys(items).keys()
            return dict(items).items() if tag == "items" else dict(enumerate(items)).values()
        if tag == "ref":
            (number,) = rest
            if type(number) is not int or number < 0:
                raise Violation("invalid reference")
            return self.containers[number]
        if tag in _SIMPLE:
            return _SIMPLE[tag](*rest)
        return self.opaque(tag, *rest)

    def _container(self, tag: str, rest: list[Any], *, register: bool) -> Any:
        """Return a new container. It is numbered before its items are decoded."""
        if tag == "bytearray":
            container: Any = bytearray.fromhex(*rest)
        elif tag == "deque":
            container = deque(maxlen=rest[0])
            rest = rest[1:]
        elif tag == "array":
            container = array.array(rest[0])
            rest = rest[1:]
        else:
            container = _TAGS[tag]()
        if register:
            self.containers.append(container)
        if tag != "bytearray":
            items = [self._value(item) for item in rest]
            if tag in ("dict", "ordered", "counter"):
                items = dict(zip(items[::2], items[1::2], strict=True))
            container.update(items) if hasattr(container, "update") else container.extend(items)
        return container


def _refill(container: Any, new: Any) -> None:
    if isinstance(container, (bytearray, array.array, list)):
        container[:] = new
        return
    container.clear()
    if isinstance(container, deque):
        container.extend(new)
    else:
        container.update(new)


_TAGS: dict[str, Callable[[], Any]] = {
    "list": list, "dict": dict, "set": set, "ordered": OrderedDict, "counter": Counter,
    "deque": deque, "bytearray": bytearray, "array": lambda: None,
}  # fmt: skip


def _number(text: str) -> int:
    if type(text) is not str:
        raise Violation("expected a number as text")
    return int(text, 16)


def _float(text: str) -> float:
    if text not in ("nan", "inf", "-inf"):
        raise Violation("expected nan or an infinity")
    return float(text)


def _characters(*codes: int) -> str:
    return "".join(map(chr, codes))


_SIMPLE: dict[str, Callable[..., Any]] = {
    "int": _number,
    "float": _float,
    "str": _characters,
    "bytes": bytes.fromhex,
    "complex": lambda real, imaginary: complex(float(real), float(imaginary)),
    "range": lambda *numbers: range(*map(_number, numbers)),
    "decimal": Decimal,
    "fraction": lambda above, below: Fraction(_number(above), _number(below)),
    "type": TYPES.__getitem__,
    "timedelta": datetime.timedelta,
    "date": datetime.date.fromisoformat,
    "datetime": datetime.datetime.fromisoformat,
    "time": datetime.time.fromisoformat,
}
