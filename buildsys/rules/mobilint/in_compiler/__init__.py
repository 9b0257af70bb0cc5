"""Programs for the compiler's own Python, started with one JSON file as their argument.

They import nothing of qbuild and nothing at their top but the standard library, and run on
Python 3.8 and later. Whatever goes wrong in the compiler shows as its own traceback.
"""
