"""Files that are written whole or not at all."""

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

NO_FILES = {"", ".", ".."}
"""Last parts of a name that name no file."""


def write_whole(contents: Mapping[str, bytes]) -> None:
    """Write files: all of them completely, or nothing changes.

    Each content goes to a new file beside its place first, which replaces the old one when all are
    on the disk. A device or a pipe cannot be replaced: it is written last. A symbolic link stays
    one.

    Errors:
        OSError of the first that cannot be written, with its name.
    """
    for name in contents:
        # "folder/" and "folder/." name a folder, whether there is one or not.
        if os.path.basename(name) in NO_FILES:  # noqa: PTH119 (a Path has lost the slash)
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    special = {name for name in contents if is_special(name)}
    ready: dict[Path, str] = {}
    try:
        for name, content in contents.items():
            if name not in special:
                place = Path(os.path.realpath(name))
                if place in ready:
                    raise FileExistsError(errno.EEXIST, "two outputs to one place", name)
                ready[place] = written_beside(place, name, content)
        for name in special:
            with naming(name):
                Path(name).write_bytes(contents[name])
        for place, temporary in list(ready.items()):
            Path(temporary).replace(place)
            del ready[place]
    finally:
        for temporary in ready.values():
            with contextlib.suppress(FileNotFoundError):
                Path(temporary).unlink()


def is_special(name: str) -> bool:
    """Whether the path names neither a file nor a directory, but exists."""
    try:
        mode = Path(name).stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def written_beside(place: Path, name: str, content: bytes) -> str:
    """The name of a new file in the folder of ``place`` that holds the content."""
    if place.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    if place.is_symlink():  # the link leads to itself
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name)
    with naming(name):
        number, temporary = tempfile.mkstemp(prefix=f".{place.name[:40]}.", dir=place.parent)
        try:
            with open(number, "wb") as file:  # noqa: PTH123 (a descriptor is no path)
                file.write(content)
                file.flush()
                os.fchmod(number, mode_for(place))
                os.fsync(number)
        except BaseException:
            Path(temporary).unlink()
            raise
    return temporary


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Make an error name the requested file, not the one beside it."""
    try:
        yield
    except OSError as error:
        error.filename = name
        raise


def mode_for(place: Path) -> int:
    """The permissions of the replaced file, or those of a new one.

    Without set-user-ID: the replaced file may be another user's.
    """
    with contextlib.suppress(OSError):
        return place.stat().st_mode & 0o777
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask
