"""Mobilint's compiler, which had three interfaces under two names in a year.

`generations` says which version has which; `mxq_arguments` turns a rule's options into that
version's own; `running` calls it. What runs inside the compiler's Python is in `in_compiler`:
programs that import nothing of qbuild, because that Python is usually another one.
It lives among the rules, not in a room of its own, because rules alone use it and its code
decides bytes: it is part of their keys.
"""
