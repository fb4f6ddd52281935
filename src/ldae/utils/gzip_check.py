"""Read a gzip file to its end, so that its checksums are compared.

Readers of images stop after the last voxel and never reach the checksum, which is at the end of the file.
"""

import zlib
from pathlib import Path

MAGIC = b"\x1f\x8b"
CHUNK = 2**20  # bytes that are read, and at most unpacked, at a time
MAX_UNPACKED = 2**32  # bytes; more than any scan has
GZIP_FORMAT = 16 + zlib.MAX_WBITS  # zlib compares the checksum and the length itself


def is_gzip(path: str | Path) -> bool:
    """Whether a file starts as a gzip file does."""
    with open(path, "rb") as handle:
        return handle.read(len(MAGIC)) == MAGIC


def check_gzip(path: str | Path) -> int:
    """Compare the checksum of every member of a gzip file.

    Returns:
        Number of bytes after the last member that are not zero: they are no part of the content.

    Raises:
        ValueError: the file is damaged or truncated, or unpacks to more than MAX_UNPACKED; one line.
    """
    with open(path, "rb") as handle:
        data, unpacked = handle.read(CHUNK), 0
        while data.startswith(MAGIC):
            member = zlib.decompressobj(GZIP_FORMAT)
            while not member.eof:
                if not data:
                    raise ValueError("the gzip file is truncated")
                try:
                    unpacked += len(member.decompress(data, CHUNK))
                except zlib.error as error:
                    raise ValueError(_describe(error)) from error
                if unpacked > MAX_UNPACKED:
                    raise ValueError(f"the gzip file unpacks to more than {MAX_UNPACKED} bytes")
                data = member.unconsumed_tail or (b"" if member.eof else handle.read(CHUNK))
            data = member.unused_data + handle.read(CHUNK)
        garbage = len(data.replace(b"\0", b""))
        while rest := handle.read(CHUNK):
            garbage += len(rest.replace(b"\0", b""))
        return garbage


def _describe(error: zlib.error) -> str:
    text = str(error)
    if "incorrect data check" in text or "incorrect length check" in text:
        return "the gzip file is damaged: its checksum is wrong"
    return f"the gzip file is damaged ({text})"
