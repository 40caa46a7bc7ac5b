"""Measuring launch configurations on the present GPU: `sparsekern tune`.

`command` parses, `driver` walks over the keys, `processes` runs `measure` in processes of its own,
`verdict` says what is faster, `tablefile` keeps the result. Everything but `measure` is plain
Python; nothing here is imported until the command runs.
"""
