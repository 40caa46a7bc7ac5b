"""How results are shown and written: tables, progress, files, and where they come from."""
