"""The program that runs a bmodel, in the compiler's Python 3.10 (standard library and numpy)."""
