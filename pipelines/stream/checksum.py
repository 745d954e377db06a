"""A file that changed on disk is found, and not trained on: checksums of Parquet pages, and when it was written.

Spark writes a CRC-32 into the header of each page, which the pinned pyarrow does not look at. The header is a Thrift
structure in the compact protocol, of which only the lengths and the checksum are needed.

Formats: https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift (PageHeader) and
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from pipelines.errors import DataError

_COMPRESSED_SIZE, _CRC = 3, 4  # fields of PageHeader
_WHAT_TO_DO = "the file changed under the table: restore it, or write the table again"
_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(13)
_Written = tuple[int, int, int]  # size, time in nanoseconds, inode
_found_whole: dict[tuple[object, ...], _Written] = {}  # what this process has looked through


@contextlib.contextmanager
def unchanged(path: Path, metadata: pq.FileMetaData, row_group: int, columns: Sequence[str]) -> Iterator[None]:
    """Around a read of a row group, which is looked through the first time and whenever the file was written since.

    Where the pages have no checksums, a file that was written since the first time is refused.

    Raises:
        DataError: A page is not what was written, or the file changes; it is named.
    """
    written, key = _written(path), (path, row_group, *columns)
    before = _found_whole.get(key)  # looked up once: another thread may be at the same row group, for the next epoch
    if before != written:
        has_checksums, damaged = look_through(path, metadata, row_group, columns)
        if before is not None and not has_checksums:
            raise _rewritten(path)
        if damaged is not None:
            raise DataError(
                f"{path} row group {row_group}, column {damaged!r}: wanted pages that fit their checksums, seen one that "
                f"does not; {_WHAT_TO_DO}"
            )
        _found_whole[key] = written
    yield
    if _written(path) != written:
        raise _rewritten(path)


def _rewritten(path: Path) -> DataError:
    return DataError(f"{path}: was written while it was read; {_WHAT_TO_DO}")


def _written(path: Path) -> _Written:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def look_through(
    path: Path, metadata: pq.FileMetaData, row_group: int, columns: Sequence[str]
) -> tuple[bool, str | None]:
    """Whether a row group's pages carry checksums, and the first column with a page that does not fit its own.

    Args:
        path: The file.
        metadata: Its footer.
        row_group: Which one to look through.
        columns: Names at the top of the schema.
    """
    found = False
    group = metadata.row_group(row_group)
    with path.open("rb") as file:
        for number in range(group.num_columns):
            chunk = group.column(number)
            name = chunk.path_in_schema.partition(".")[0]
            if name not in columns:
                continue
            start = chunk.data_page_offset
            if chunk.has_dictionary_page and chunk.dictionary_page_offset:
                start = min(start, chunk.dictionary_page_offset)
            file.seek(start)
            for page, crc in _pages(file.read(chunk.total_compressed_size)):
                found = found or crc is not None
                if not _is_whole(page, crc):
                    return found, name
    return found, None


def _is_whole(page: memoryview, crc: int | None) -> bool:
    return crc is None or zlib.crc32(page) == crc % 2**32


def _pages(chunk: bytes) -> Iterator[tuple[memoryview, int | None]]:
    """Each page of a column chunk as it lies on disk, with its checksum; a header that makes no sense is a bad page."""
    at, whole = 0, memoryview(chunk)
    while at < len(chunk):
        try:
            fields, at = _read_struct(chunk, at)
            size = fields[_COMPRESSED_SIZE]
        except (IndexError, KeyError):
            size = -1
        if not 0 <= size <= len(chunk) - at:
            yield whole[at:at], 1
            return
        yield whole[at : at + size], fields.get(_CRC)
        at += size


def _read_struct(data: bytes, at: int) -> tuple[dict[int, int], int]:
    """The integer fields of a structure by their number, and where it ends."""
    fields: dict[int, int] = {}
    number = 0
    while (head := data[at]) != _STOP:
        at += 1
        kind, step = head & 0x0F, head >> 4
        if step:
            number += step
        else:
            number, at = _read_zigzag(data, at)
        if kind in (_I16, _I32, _I64):
            fields[number], at = _read_zigzag(data, at)
        else:
            at = _skip(data, at, kind)
    return fields, at + 1


def _skip(data: bytes, at: int, kind: int) -> int:
    """Where a value ends. Booleans stand in the head of their field."""
    if kind in (_TRUE, _FALSE):
        return at
    if kind == _BYTE:
        return at + 1
    if kind in (_I16, _I32, _I64):
        return _read_varint(data, at)[1]
    if kind == _DOUBLE:
        return at + 8
    if kind == _BINARY:
        size, at = _read_varint(data, at)
        return at + size
    if kind == _STRUCT:
        return _read_struct(data, at)[1]
    raise KeyError(kind)  # a page's header holds no lists, sets or maps


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _read_zigzag(data: bytes, at: int) -> tuple[int, int]:
    value, at = _read_varint(data, at)
    return (value >> 1) ^ -(value & 1), at
