"""Quantized networks in pipelines: what they are, at which steps activations keep 16 bits, and how they get there.

`networks` looks at networks, `layers` puts quantized layers in and takes them out again, `steps` is the precision by
step, `loading` what `load_pipeline` does.
"""
