from typing import final

@final
class Ledger:
    """Regions and page runs of one VMM."""
    def holds(self, va: int, size: int) -> bool:
        """Whether ``[va, va + size)`` lies wholly inside one region."""
    def cut(self, at: int) -> bool:
        """Make ``at`` a border between runs; false when memory is short."""
    def try_isolate(self, start: int, end: int) -> bool:
        """``isolate``."""
    def coalesce(self, start: int, end: int) -> None:
        """Join the runs in and around ``[start, end)`` that are alike."""
    def try_split(self, at: int) -> bool:
        """``split``."""
    def undo_split(self, at: int) -> None:
        """``join``."""
    def remove(self, start: int, end: int) -> None:
        """Forget ``[start, end)``: whole runs, up to an end that is a region's end."""
    def set_state(self, start: int, end: int, state: int) -> None:
        """Set the state of isolated pages; no guards hold them back then."""
    def set_protection(self, start: int, end: int, protection: int) -> None:
        """Set the protection of isolated pages."""
    def try_pin(self, start: int, end: int) -> bool:
        """``pin``."""
    def unpin(self, start: int, end: int) -> None:
        """Let go of pages that ``pin`` holds."""
    def check(self) -> None:
        """Raise AssertionError if an invariant of this module's head does not hold."""
    def add(self, base: int, size: int, protection: int = 0) -> bool:
        """Enter a region of reserved private pages; false when memory is short."""
    def listing(self) -> list[tuple[int, int, int, int, int, int]]:
        """Every run: ``(region's base, start, end, state, protection, pins)``."""

def set_leaf_limit(entries: int | None = None) -> None:
    """Take memory for a new leaf from so many regions or runs on; for tests.

    Args:
        entries: how many, or None for as many as the map itself says.
    """
