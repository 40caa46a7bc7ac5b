"""The products on a CPU: which implementation runs, and those that torch alone can do."""
