"""Other people's trainers: each module is imported only by who uses it, and needs its package.

`lightning` has a callback of PyTorch Lightning, `trainer` one of Hugging Face's `Trainer`,
`accelerate` a function for loops of accelerate; `monitor` is what they log. `onnx` writes files for
other runtimes.
"""
