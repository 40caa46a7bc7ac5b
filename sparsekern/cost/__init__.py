"""What a model costs: FLOPs, bytes and seconds of its layers and of a training step."""
