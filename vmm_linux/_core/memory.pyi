def set_rule(in_chunk: int | None = None, in_vmm: int | None = None) -> None:
    """Take guards from these numbers of runs on; for tests.

    Args:
        in_chunk: committed runs of a chunk, or None for ``CROWDED``.
        in_vmm: runs of a VMM, or None for ``FRAGMENTED``.
    """
