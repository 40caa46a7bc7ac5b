"""Result files of benchmarks: what changed between two, and pictures of one."""
