"""The products on a CPU compiled by numba; README.md explains how its convolution walks."""
