"""Tables of text."""

from sparsekern.show import tables

CELLS = [["name", "n"], ["a|b", "1"]]


def test_a_bar_in_a_cell_of_markdown_is_no_column():
    assert tables.markdown(CELLS) == ["| name | n |", "| --- | ---: |", r"| a\|b | 1 |"]
    assert tables.aligned(CELLS) == ["name  n", "a|b   1"]
