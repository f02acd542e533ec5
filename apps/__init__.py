"""Everything that a person starts: the `tessera` command, the studio, training, conversion, evaluation.

May import every other package; no other package imports this one.
"""
