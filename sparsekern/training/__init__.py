"""The trainer of the command line: its data, networks, runs, and their report."""
