"""Values whose own code raises, whatever is asked of them."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator


class UntoldError(Exception):
    """An exception that cannot be told of."""

    def __str__(self) -> str:
        raise ZeroDivisionError

    __repr__ = __str__


#: What a value may raise.
ERRORS: tuple[type[Exception], ...] = (
    ZeroDivisionError,
    RecursionError,
    StopIteration,
    AttributeError,
    OverflowError,
    UntoldError,
)

#: What Python calls of a value. Not: ``__new__``, ``__init__``, ``__del__``, which make and end it.
OF_A_VALUE = [
    f"__{name}__"
    for name in (
        *("repr", "str", "format", "bytes", "hash", "bool", "sizeof", "dir", "doc", "dict"),
        *("lt", "le", "eq", "ne", "gt", "ge", "class", "getattribute", "getattr", "setattr"),
        *("len", "getitem", "iter", "next", "contains", "reversed", "length_hint", "missing"),
        *("int", "float", "index", "complex", "round", "trunc", "floor", "ceil", "neg", "pos"),
        *("add", "radd", "sub", "rsub", "mul", "rmul", "and", "rand", "or", "ror", "invert"),
        *("mod", "rmod", "rshift", "lshift", "floordiv", "divmod", "abs", "xor", "pow"),
        *("call", "enter", "exit", "fspath", "buffer", "release_buffer", "array"),
        *("array_interface", "array_struct", "reduce", "reduce_ex", "getstate", "copy"),
    )
]
#: What Python's own classes offer besides.
PLAIN: tuple[str, ...] = (
    "bit_length",
    "real",
    "numerator",
    "conjugate",
    "is_integer",
    "as_integer_ratio",
    "keys",
)
PLAIN += ("encode", "isprintable", "casefold", "startswith", "decode", "items", "get", "count")
PLAIN += ("fileno", "family", "type", "proto", "gettimeout", "dtype", "shape", "value", "name")
#: Attributes of a class that a metaclass may compute.
ATTRIBUTES_OF_A_CLASS = ("__name__", "__module__", "__mro__", "__bases__")
#: What Python calls of a class.
OF_A_CLASS = [*ATTRIBUTES_OF_A_CLASS]
OF_A_CLASS += [f"__{name}__" for name in ("repr", "str", "hash", "eq", "getattribute", "bool")]
OF_A_CLASS += [f"__{name}__" for name in ("instancecheck", "subclasscheck", "call", "format")]


def raising(error: type[BaseException]) -> Any:  # noqa: ANN401  a descriptor of anything
    """A method that raises, and as an attribute raises just so."""

    class Raising:
        def __get__(self, instance: object, owner: object) -> NoReturn:
            raise error

    return Raising()


def methods(names: list[str], error: type[BaseException]) -> dict[str, Any]:
    """Those methods; special ones are looked up without asking an attribute for them."""

    def method(*_: object, **__: object) -> NoReturn:
        raise error

    made: dict[str, Any] = {}
    for name in names:
        plain = name in ("__class__", "__dict__", "__doc__", *ATTRIBUTES_OF_A_CLASS)
        plain = plain or not name.startswith("__")
        made[name] = raising(error) if plain else method
    return made


def hostile_class(base: type, error: type[BaseException]) -> type:
    """A subclass whose values, and which itself, raises whenever it is asked something."""
    of_a_class = methods(OF_A_CLASS, error)
    meta = type("Meta", (type,), of_a_class)
    made: type = type.__call__(meta, "Hostile", (base,), methods([*OF_A_VALUE, *PLAIN], error))
    return made


def made_of(kind: type, base: type, *arguments: object) -> object:
    """A value of a hostile class, made without asking the class."""
    plain: Any = base  # whose methods are called, and not those of the class
    made: object = plain.__new__(kind, *arguments)
    if base in {list, dict}:
        plain.__init__(made, *arguments)
    return made


def liar(kind: type) -> object:
    """A value that says it is of another class."""
    return type("Liar", (), {"__class__": property(lambda _: kind)})()


BASES: dict[type, tuple[object, ...]] = {
    object: (),
    int: (4096,),
    str: ("deny",),
    bytes: (b"4096",),
    float: (4096.0,),
    complex: (4096j,),
    tuple: ((1, 2),),
    list: ((1, 2),),
    dict: ({"va": 1},),
    bytearray: (),
}


def values(error: type[BaseException]) -> Iterator[tuple[str, object]]:
    """Values of every kind that raise this, by a name for each."""
    for base, arguments in BASES.items():
        yield (
            f"{base.__name__}, {error.__name__}",
            made_of(hostile_class(base, error), base, *arguments),
        )
    yield f"class, {error.__name__}", hostile_class(object, error)


def broken() -> Iterator[tuple[str, object]]:
    """Values that are merely odd."""
    released = memoryview(bytearray(8))
    released.release()
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    circle: list[object] = []
    circle.append(circle)
    yield "released memoryview", released
    yield "strided memoryview", memoryview(bytearray(8))[::2]
    yield "deep list", deep
    yield "circle", circle
    yield "nan", float("nan")
    yield "infinity", float("inf")
    yield "huge int", 1 << 20_000_000
    yield "huge negative int", -(1 << 2_000_000)
    yield "huge text", "x" * 2_000_000
    yield "huge bytes", bytes(2_000_000)
    yield "surrogates and line ends", "\ud800\n\r\u2028\x1b[2J"
    yield "class with a line end", type("Two\nlines\x1b", (), {})()
    yield "class with a long name", type("x" * 1_000_000, (), {})()
    yield from ((f"liar: {kind.__name__}", liar(kind)) for kind in (int, str, socket.socket, bool))
