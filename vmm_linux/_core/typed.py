"""What ``typing`` does to classes and functions as they are made, without its import of 3 ms.

A type checker sees the originals.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple, TypeVar, final, overload

    import numpy as np

    Scalar = TypeVar("Scalar", bound=np.generic)
    # Dtypes whose scalar a type checker knows; of strings NumPy's own functions do not either.
    DtypeOf = type[Scalar] | np.dtype[Scalar]
else:
    from collections import namedtuple

    class Fields(type):
        """Makes a named tuple of a class with annotations."""

        def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, object]) -> type:
            """Make ``NamedTuple`` itself, and the tuples declared as its subclasses."""
            if not bases:
                return super().__new__(cls, name, bases, body)
            made = namedtuple(name, body["__annotations__"], module=body["__module__"])  # noqa: PYI024
            for key, value in body.items():
                if key not in {"__module__", "__slots__"}:
                    setattr(made, key, value)
            return made

    class NamedTuple(metaclass=Fields):
        """The base of a declared named tuple."""

    def final(kind: type) -> type:
        """Mark a class that has no subclasses."""
        kind.__final__ = True
        return kind

    def overload(function: object) -> object:
        """Mark what is to be replaced by the function of the same name that follows."""
        return function


__all__ = ["NamedTuple", "final", "overload"]
