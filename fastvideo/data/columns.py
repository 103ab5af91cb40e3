"""Columns of a dataset in one form each, whichever of Arrow's forms of the same values a program wrote.

pandas writes categories as dictionaries, Polars large types and views, DuckDB enums, others lists of bytes.
"""

from __future__ import annotations

import pyarrow as pa
from pyarrow import types

from fastvideo.errors import UserError
from fastvideo.wording import see

TEXT, BYTES, SHAPE = pa.large_string(), pa.large_binary(), pa.large_list(pa.int64())
NAMES = {TEXT: "string", BYTES: "binary", SHAPE: "list of int64"}
"""Types as a message calls them."""


def plain(table: pa.Table) -> pa.Table:
    """The same values as large_string, large_binary and large_list of int64; bytes and characters are not copied."""
    return pa.table({name: _plain(table[name], _wanted(name)) for name in table.column_names})


def check_column(schema: pa.Schema, column: str) -> None:
    """Check that a column has the values that its name demands, in any form.

    Raises:
        UserError: if it is missing, there twice or of another type.
    """
    if schema.names.count(column) > 1:
        raise UserError(f"column {column!r} is there {schema.names.count(column)} times")
    if column not in schema.names:
        raise UserError(f"column {column!r} is missing; it has {', '.join(schema.names)}")
    found, wanted = schema.field(column).type, _wanted(column)
    if not (types.is_null(found) or _holds(_decoded(found), wanted)):
        raise UserError(
            f"column {column!r} has type {found}, {NAMES[wanted]} is expected{see('a-column-has-another-type')}"
        )


def _wanted(column: str) -> pa.DataType:
    suffix = column.rpartition("_")[2]
    return {"bytes": BYTES, "shape": SHAPE}.get(suffix, TEXT)


def _decoded(found: pa.DataType) -> pa.DataType:
    """Type of the values themselves."""
    if isinstance(found, pa.BaseExtensionType):
        return _decoded(found.storage_type)
    if types.is_dictionary(found) or types.is_run_end_encoded(found):
        return _decoded(found.value_type)
    return found


def _holds(found: pa.DataType, wanted: pa.DataType) -> bool:
    if wanted == SHAPE:
        return _is_list(found) and types.is_integer(_decoded(found.value_type))
    if types.is_binary(found) or types.is_large_binary(found) or types.is_binary_view(found):
        return True  # as text too: old writers do not mark UTF-8
    if wanted == TEXT:
        return types.is_string(found) or types.is_large_string(found) or types.is_string_view(found)
    return types.is_fixed_size_binary(found) or (_is_list(found) and found.value_type == pa.uint8())


def _is_list(found: pa.DataType) -> bool:
    plain_list = types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found)
    return plain_list or types.is_list_view(found) or types.is_large_list_view(found)


def _plain(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.ChunkedArray:
    return pa.chunked_array([_plain_chunk(chunk, wanted) for chunk in column.chunks], wanted)


def _plain_chunk(chunk: pa.Array, wanted: pa.DataType) -> pa.Array:
    if isinstance(chunk, pa.ExtensionArray):
        return _plain_chunk(chunk.storage, wanted)
    if wanted == BYTES and _is_list(chunk.type):
        return _joined(chunk.cast(pa.large_list(pa.uint8())))
    try:
        return chunk.cast(wanted, safe=wanted != TEXT)  # a row's own text is checked when it is read
    except pa.ArrowNotImplementedError:  # some forms within a form
        return pa.array(chunk.to_pylist(), wanted)


def _joined(lists: pa.LargeListArray) -> pa.Array:
    """Lists of bytes as binary values, over the same memory."""
    valid, offsets, _, values = lists.buffers()
    first = lists.values.offset
    data = values if values is None else values.slice(first)
    return pa.Array.from_buffers(BYTES, len(lists), [valid, offsets, data], offset=lists.offset)
