"""The errors of inspection."""

from vmm_linux.errors import Fail, InvalidOperation, NoCapability, ResourceNotFound


class NoSuchProcess(ResourceNotFound, ProcessLookupError):
    """No process has this id (``RESOURCE_NOT_FOUND``)."""


class ProcessExited(NoSuchProcess):
    """It ended, or started another program, during the reading (``RESOURCE_NOT_FOUND``)."""


class ZombieProcess(InvalidOperation):
    """All its threads have ended, and it waits for its parent, without memory.

    (``INVALID_OPERATION``)
    """


class KernelThread(InvalidOperation):
    """It is a thread of the kernel, without memory of its own (``INVALID_OPERATION``)."""


class AccessDenied(NoCapability):
    """The kernel does not let this process inspect that one (``NO_CAPABILITY``)."""


class UnreadableText(Fail, ValueError):
    """The kernel's text has a line that cannot be read; the message quotes it (``FAIL``)."""
