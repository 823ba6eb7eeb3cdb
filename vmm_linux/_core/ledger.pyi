from typing import final

@final
class Ledger:
    """Regions and page runs of one VMM."""
    def holds(self, va: int, size: int) -> bool:
        """Whether ``[va, va + size)`` lies wholly inside one region."""
    def cut(self, at: int) -> bool:
        """Let a run end at ``at`` and the next start there; false when memory is short."""
    def try_isolate(self, start: int, end: int) -> bool:
        """``isolate``."""
    def coalesce(self, start: int, end: int) -> None:
        """Join the runs in and around ``[start, end)`` that are alike."""
    def try_split(self, at: int) -> bool:
        """``split``."""
    def undo_split(self, at: int) -> None:
        """``join``."""
    def remove(self, start: int, end: int) -> None:
        """Forget ``[start, end)``: whole runs, up to a region's end."""
    def set_state(self, start: int, end: int, state: int) -> None:
        """Set the state of pages, which no guards cover then."""
    def set_protection(self, start: int, end: int, protection: int) -> None:
        """Set the protection of isolated pages."""
    def try_pin(self, start: int, end: int) -> bool:
        """``pin``."""
    def unpin(self, start: int, end: int) -> None:
        """Undo ``pin``."""
    def check(self) -> None:
        """Raise AssertionError if an invariant of ``flaw`` does not hold."""
    def add(self, base: int, size: int, protection: int = 0) -> bool:
        """Enter a region of reserved private pages; false when memory is short."""
    def listing(self) -> list[tuple[int, int, int, int, int, int]]:
        """Every run: ``(region's base, start, end, state, protection, pins)``."""

def set_leaf_limit(entries: int | None = None) -> None:
    """Let a leaf of the maps hold at most so many regions or runs; for tests.

    Args:
        entries: how many, or None for as many as the maps themselves say.
    """
