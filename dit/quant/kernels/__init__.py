"""What multiplies quantized weights: one contract, a kernel for each kind of machine, and a plain reference."""
