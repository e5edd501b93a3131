"""Training after something was removed: one loop, and the stages that use it."""
