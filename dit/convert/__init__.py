"""Published checkpoints in, and out again in the layout they came in."""
