"""Models as static graphs of named tensors, which compilers of NPUs take.

One description serves four readers: `evaluate` runs it in float (the reference) or quantized
(the simulation), `ranges` observes every tensor of it, and a writer turns it into a file.
"""
