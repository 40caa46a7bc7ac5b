"""Other people's names: for code and checkpoints that come from other sparse training libraries.

Nothing here is imported by `import sparsekern`. docs/coming-from.md maps old names to new ones.
"""
