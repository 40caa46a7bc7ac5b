"""Launch tables are data that somebody wrote: each file, key and value is checked."""

import json

import pytest

from sparsekern.kernels import domains, tables
from sparsekern.kernels.tables import TableError

KEY = "spmm/half/64/long/tma"
FIELDS = {"BM": 64, "BK": 64, "GROUP": 8, "SWAP": False, "num_warps": 4, "num_stages": 3}


def table_of(fields, key=KEY):
    return json.dumps({"arch": "sm90", "entries": {key: fields}})


BAD_TABLES = {
    "text": ("no JSON", ["is not a launch table"]),
    "list": ("[]", ["is not a launch table"]),
    "no-arch": ('{"entries": {}}', ["is not a launch table", "arch"]),
    "no-entries": ('{"arch": "sm90"}', ["is not a launch table", "entries"]),
    "key": ('{"arch": "sm90", "entries": {"gemm/half/64/any/tma": {}}}', ["spmm_t", "gemm/half"]),
    "parts": ('{"arch": "sm90", "entries": {"spmm/half": {}}}', ["op/kind/edge", "'spmm/half'"]),
    "fields": (
        '{"arch": "sm90", "entries": {"spmm/half/64/long/tma": {"BM": 64}}}',
        ["spmm/half/64/long/tma", "num_stages", "{'BM': 64}"],
    ),
    "no-dict": (table_of([64]), ["must have the fields", "[64]"]),
    "nothing": ("", ["is not a launch table"]),
    "no-text": (b"\xff\xfe\x00", ["is not a launch table"]),
    "deep": ("[" * 200_000, ["is not a launch table", "Recursion"]),
    "huge": (" " * (tables.MOST_BYTES + 1), ["expected at most 16,777,216 bytes"]),
    "number": (table_of(FIELDS | {"BM": 7}).replace("7", "7" * 5000), ["is not a launch table"]),
    "twice": (
        '{"arch": "sm90", "arch": "sm80", "entries": {}}',
        ["'arch' is there more than once"],
    ),
    "arch": ('{"arch": 7, "entries": {}}', ["arch must be one of ('sm80'", "got 7"]),
    "kind": (table_of(FIELDS, "spmm/fp8/64/long/tma"), ["kind of", "'half'", "spmm/fp8/64/long"]),
    "edge": (table_of(FIELDS, "spmm/half/65/long/tma"), ["edge of", "'64'", "spmm/half/65/long"]),
    "rows": (table_of(FIELDS, "spmm/half/64/wide/tma"), ["rows of", "'long'", "/64/wide/tma"]),
    "loads": (table_of(FIELDS, "spmm/half/64/long/x"), ["loads of", "'tma'", "/64/long/x"]),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables_say_what_is_wrong(case, tmp_path):
    text, fragments = BAD_TABLES[case]
    path = tmp_path / "bad.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TableError, match=r"bad\.json") as caught:
        tables.read(path)
    assert all(fragment in str(caught.value) for fragment in fragments)


_NO_SIZE = ["64; import os", 2**70, -64, 0, 63, 8, 2048, None, [64], 64.0, True, {"BM": 64}]
BAD_VALUES = [
    *(("BM", value, "a power of two in [16, 1024]") for value in _NO_SIZE),
    ("GROUP", 3, "a power of two in [1, 1024]"),
    ("num_warps", 6, "a power of two in [1, 32]"),
    ("num_warps", 10**6, "a power of two in [1, 32]"),
    ("num_stages", 0, "an integer in [1, 16]"),
    ("num_stages", 17, "an integer in [1, 16]"),
    ("SWAP", 1, "true or false"),
]


@pytest.mark.parametrize(("field", "value", "expected"), BAD_VALUES)
def test_bad_values_name_file_entry_and_field(field, value, expected, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(table_of(FIELDS | {field: value}))
    with pytest.raises(TableError) as caught:
        tables.read(path)
    assert str(caught.value).startswith(f"{path}: entry {KEY!r}: {field} must be {expected}; got ")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_in_json_is_none_in_a_table(number, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(table_of(FIELDS | {"BM": 777}).replace("777", number))
    with pytest.raises(TableError, match=f"bad.json is not a launch table: .*{number}"):
        tables.read(path)


def test_a_nest_as_deep_as_json_reads_is_told_shortly(tmp_path):
    path, nest = tmp_path / "bad.json", "[" * 500 + "]" * 500
    path.write_text(table_of(FIELDS | {"BM": 777}).replace("777", nest))
    with pytest.raises(TableError, match=r"BM must be .*\.\.\.") as caught:
        tables.read(path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_a_table_that_can_not_be_read(name, tmp_path):
    with pytest.raises(TableError, match="is not a launch table: .*(No such file|Is a directory)"):
        tables.read(tmp_path / name)


@pytest.mark.parametrize("arch", domains.ARCHES)
def test_shipped_tables_are_read(arch):
    found, entries = tables.read(tables._FOLDER / f"{arch}.json")
    assert found == arch
    assert len(entries) > 100
