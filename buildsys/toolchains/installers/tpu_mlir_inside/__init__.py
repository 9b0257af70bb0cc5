"""Programs and modules for the Python 3.10 that TPU-MLIR runs in, which has not qbuild but the
standard library and numpy. The installer copies the stand-ins there; the others are run as files.
"""
