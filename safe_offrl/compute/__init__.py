"""How a gradient step is taken and remembered: optimiser, compiler, device, state."""
