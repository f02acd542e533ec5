"""From a name, folder, file or Hub id to a pipeline ready to run.

`load` is the way in. `sources` finds out what a name stands for and has every component of a folder checked before a
weight is read.
"""
