"""The parts of a policy: rules, the ready rules, and the error for a wrong one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Final

from vmm_linux._core.values import one_line
from vmm_linux.errors import InvalidArgument

BITS: Final = ("all", "any", "no")


class PolicyError(InvalidArgument):
    """An invalid policy: ``INVALID_ARGUMENT``.

    Attributes:
        file: its file, or None.
        line: of the file, counted from 1, or None.
        reason: the mistake, and the expected value.
    """

    def __init__(self, reason: str, file: str | None = None, line: int | None = None) -> None:
        name = "" if file is None else one_line(file)
        where = "" if file is None else f"{name}:{line}: " if line else f"{name}: "
        super().__init__("Policy", f"{where}{reason}")
        self.reason = reason
        self.file = file
        self.line = line

    def __reduce__(self) -> Any:  # noqa: ANN401  other arguments than those of the base class
        return type(self), (self.reason, self.file, self.line)


class FlawError(Exception):
    """A mistake in a policy, and its keys: of a table, or of a list by number."""

    def __init__(self, reason: str, *path: str | int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.path = path


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Allows or denies calls. All given conditions have to hold.

    Attributes:
        allow, deny: one of the two: names of methods, or ``"*"`` for all methods with the
            properties in the conditions.
        name: its name in a denial.
        all_flags, any_flags, no_flags: ``VmmFlags`` by name: the call's argument has every one, at
            least one, none of them.
        min_size, max_size: the bytes of the call, bounds included: of ranges their sum; of a
            receiving call ``max_size``, and without one more than any bound.
        all_rights, any_rights, no_rights: ``Rights`` that a copy, a receiver or a descriptor gets.
        all_seals, any_seals, no_seals: ``Seal``: of a buffer that leaves (``send_handle``,
            ``handle_fileno``) its own, of others those that are put on or demanded.
        peer_uid, peer_gid: users and groups, one of which made the other end of the socket.
        other_user: True: another user than this process's made it.

    Where the maker of the other end is unknown, a condition about it holds in a rule that denies,
    and fails in one that allows. Users and groups that this process's user namespace does not map
    are unknown too: the kernel reports all of them as ``kernel.overflowuid`` (65534), which in such
    a namespace identifies no user.
    """

    allow: str | Sequence[str] | None = None
    deny: str | Sequence[str] | None = None
    name: str | None = None
    all_flags: Sequence[str] = ()
    any_flags: Sequence[str] = ()
    no_flags: Sequence[str] = ()
    min_size: int | None = None
    max_size: int | None = None
    all_rights: Sequence[str] = ()
    any_rights: Sequence[str] = ()
    no_rights: Sequence[str] = ()
    all_seals: Sequence[str] = ()
    any_seals: Sequence[str] = ()
    no_seals: Sequence[str] = ()
    peer_uid: int | Sequence[int] | None = None
    peer_gid: int | Sequence[int] | None = None
    other_user: bool | None = None


KEYS: Final = tuple(each.name for each in fields(Rule))

BUFFERS: Final = ("mdl_create", "mdl_create_from_vm", "mdl_create_from_buf", "mdl_map")
"""The methods that make and map buffers."""
READY_RULES: Final = (
    Rule(name="W^X", deny=("allocate", "protect", *BUFFERS), all_flags=("WRITE", "EXECUTE")),
    Rule(name="no executable MDL", deny=BUFFERS, any_flags=("EXECUTE",)),
    Rule(name="no transfer to other users", deny=("send_handle",), other_user=True),
    # The receiver of a descriptor is unknown.
    Rule(name="no transfer to other users", deny=("handle_fileno",)),
    Rule(
        name="only frozen or published buffers leave",
        deny=("send_handle", "handle_fileno"),
        no_seals=("PUBLISH", "FREEZE"),
    ),
)
READY: Final[Mapping[str, tuple[Rule, ...]]] = MappingProxyType(
    {
        str(each.name): tuple(rule for rule in READY_RULES if rule.name == each.name)
        for each in READY_RULES
    }
)
"""The ready rules, by name."""
