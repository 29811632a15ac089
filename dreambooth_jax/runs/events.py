"""TensorBoard event files: scalars alone, without TensorFlow, PyTorch or a background thread.

A file is a sequence of records (length, checksum of the length, an `Event` message, its checksum). The fields used of
the messages, by number: Event: wall_time 1, step 2, file_version 3, summary 5, session_log 7; Summary: value 1; Value:
tag 1, simple_value 2; SessionLog: status 1 (START is 1).
"""

import struct
import time
from collections.abc import Mapping

from etils import epath

from dreambooth_jax.files.atomic import naming


def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC = _table()


def _checksum(data: bytes) -> bytes:
    """CRC-32C, masked as in TFRecord files."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _record(event: bytes) -> bytes:
    length = struct.pack("<Q", len(event))
    return length + _checksum(length) + event + _checksum(event)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _message(field: int, data: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _varint(len(data)) + data


def _event(step: int, content: bytes) -> bytes:
    return _record(b"\x09" + struct.pack("<d", time.time()) + b"\x10" + _varint(step) + content)


class Events:
    """One event file.

    Args:
        path: of the file, local or in a bucket; what is there is replaced.
        first_step: TensorBoard hides what earlier files say of this step and later ones; None: it hides nothing.
    """

    def __init__(self, path: epath.Path, *, first_step: int | None = None) -> None:
        self._path = path
        self._is_remote = "://" in str(path)
        start = b"" if first_step is None else _event(first_step, _message(7, b"\x08\x01"))
        self._written, self._new = b"", _event(0, _message(3, b"brain.Event:2")) + start

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds the values of a step; `flush` writes them."""
        values = (
            _message(1, _message(1, tag.encode()) + b"\x15" + struct.pack("<f", value))
            for tag, value in scalars.items()
        )
        self._new += _event(step, _message(5, b"".join(values)))

    def flush(self) -> None:
        """Writes what is new; a bucket's objects cannot be appended to and are written whole."""
        if self._is_remote:
            self._written += self._new
            self._path.write_bytes(self._written)
        else:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with naming(self._path), open(self._path, "ab") as file:
                file.write(self._new)
        self._new = b""
