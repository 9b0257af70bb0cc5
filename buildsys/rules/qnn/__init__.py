"""What makes a QNN context: the graphs that a model is cut into, their compilation, the proof.

`pieces` says which graphs there are; `compiling` has each compiled in a process of its own;
`probes` runs samples through them in float, in the emulator and in our own simulation;
`contract` writes down and checks what goes in and out. What runs in the compiler's Python is in
`in_compiler`: programs that import nothing of qbuild's. The room belongs to the rule alone, and
its code decides bytes: it is part of its key.
"""
