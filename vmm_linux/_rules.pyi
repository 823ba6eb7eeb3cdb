from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

class RuleTable:
    # So that subclasses may take what arguments they like.
    def __new__(cls, *arguments: object, **keywords: object) -> Self: ...
    @property
    def ask(self) -> Callable[..., object] | None: ...
    @property
    def audit_failure(self) -> str | None: ...
    def _compile(
        self,
        rules: Iterable[tuple[Any, ...]],
        names: tuple[str, ...],
        allows_otherwise: bool,
        ask: object,
        forbidden: int,
        audit_failure: object,
    ) -> None: ...

def first_hidden(rules: Sequence[tuple[Any, ...]], start: int) -> tuple[int, int] | None: ...
