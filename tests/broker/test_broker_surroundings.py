"""A broker among things that are not as it would like them: each is borne, or refused and named."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from vmm_linux._tools.commands import CannotTryError
from vmm_linux.broker.command import Binding

if TYPE_CHECKING:
    from pathlib import Path


def test_a_socket_of_another_kind_that_is_listened_at_is_not_removed(tmp_path: Path) -> None:
    path = f"{tmp_path}/socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(path)
        other.listen()
        with pytest.raises(CannotTryError, match="in use"):
            Binding(path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(path)
    binding = Binding(path)  # what nobody listens at is replaced, as ever
    binding.listener.close()
    binding.remove()
    os.close(binding.lock)
