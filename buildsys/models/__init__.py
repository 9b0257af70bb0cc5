"""What a model family looks like: which norm feeds which linear, what turns how, what runs it.

Arrows: `models` calls `formats` (bytes) and `quant` (mathematics) and is called by `rules`.
A new family is one file here with `describe(config) -> Family`, and its line in `open.FAMILIES`.
"""
