import socket
from typing import Final, final

from vmm_linux._open_file import Descriptor
from vmm_linux.errors import VmmError

MAGIC: Final[bytes]
VERSION: Final[int]
MESSAGE_SIZE: Final[int]
MOST_FD: Final[int]

def check_socket(method: str, sock: object) -> int: ...
def duplicate(method: str, sock: socket.socket) -> socket.socket: ...
def peer_of(sock: socket.socket) -> tuple[int, int | None, int | None] | None: ...
def cut_off(method: str, sock: socket.socket, what: str) -> VmmError: ...

@final
class Received:
    def __len__(self) -> int: ...
    def take(self) -> Descriptor: ...

def read_message(
    sock: socket.socket, length: int, most_descriptors: int
) -> tuple[bytes, Received, int]: ...
