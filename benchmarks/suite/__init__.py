"""The benchmarks of one machine: a file for each family of operators; `python -m benchmarks.suite`.

A case is set up once, for its speed and its memory. Its result must equal the dense reference bit
for bit on integers before it is timed, and what is timed is what was checked.
"""
