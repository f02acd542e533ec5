"""What a pipeline is and can do: one record (`record`), declared by ours, found out about diffusers'."""
