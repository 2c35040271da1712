"""Scalars for TensorBoard, whose own writer would install its server as well.

A file is a row of records: length, its checksum, data, their checksum. The data
are messages in the encoding of Protocol Buffers, of which a scalar needs four:

    Event   1: wall time (double)  2: step  3: file version  5: Summary
    Summary 1: Value, repeated     Value 1: tag  2: value (float)

as in tensorflow/core/util/event.proto and core/framework/summary.proto.
"""

from __future__ import annotations

import functools
import os
import pathlib
import socket
import struct
import time
from collections.abc import Mapping

VARINT, DOUBLE, BYTES, FLOAT = 0, 1, 2, 5  # wire types


class EventFile:
  """Adds to a new file in a folder, which TensorBoard finds by its name."""

  def __init__(self, folder: pathlib.Path):
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{time.time_ns() // 10**6}.{socket.gethostname()}.{os.getpid()}"
    self._file = (folder / f"events.out.tfevents.{name}").open("ab")
    self._add(_field(3, BYTES, b"brain.Event:2"))

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes the scalars of a step; they are on disk when it returns."""
    values = b"".join(
      _field(
        1,
        BYTES,
        _field(1, BYTES, tag.encode()) + _field(2, FLOAT, value),
      )
      for tag, value in scalars.items()
    )
    self._add(_field(2, VARINT, step) + _field(5, BYTES, values))

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def _add(self, event: bytes) -> None:
    event = _field(1, DOUBLE, time.time()) + event
    length = struct.pack("<Q", len(event))
    self._file.write(length + _checksum(length) + event + _checksum(event))
    self._file.flush()


def _field(number: int, kind: int, value) -> bytes:
  """Encodes one field of a message."""
  key = _varint(number << 3 | kind)
  if kind == VARINT:
    return key + _varint(value)
  if kind == BYTES:
    return key + _varint(len(value)) + value
  return key + struct.pack("<d" if kind == DOUBLE else "<f", value)


def _varint(value: int) -> bytes:
  """Encodes seven bits a byte, the lowest first."""
  encoded = bytearray()
  while value > 127:
    encoded.append(value & 127 | 128)
    value >>= 7
  return bytes([*encoded, value])


@functools.cache
def _table() -> list[int]:
  """Returns the remainders of all bytes for CRC-32C, in reversed bits."""
  table = []
  for remainder in range(256):
    for _ in range(8):
      remainder = remainder >> 1 ^ (remainder & 1) * 0x82F63B78
    table.append(remainder)
  return table


def _checksum(data: bytes) -> bytes:
  """Returns the CRC-32C, masked as records have it."""
  table, crc = _table(), 2**32 - 1
  for byte in data:
    crc = table[(crc ^ byte) & 255] ^ crc >> 8
  crc ^= 2**32 - 1
  masked = (crc >> 15 | crc << 17) + 0xA282EAD8
  return struct.pack("<I", masked & 2**32 - 1)
