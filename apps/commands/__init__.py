"""What the commands of `tessera` do; `apps.cli` parses and then imports one of them."""
