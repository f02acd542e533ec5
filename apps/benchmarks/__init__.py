"""What `tessera bench` measures, a file each."""
