"""What follows the weights when their topology changes: the optimizer's state."""
