"""Where sparsity pays in a model: times, memory and FLOPs of its layers, dense and sparse."""
