"""Published checkpoints to models of ours and back."""
