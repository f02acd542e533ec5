"""Published checkpoints turned into folders of ours."""
