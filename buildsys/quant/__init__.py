"""The mathematics of quantization: tensors in, tensors out. No files, no recipe.

Imports nothing else of qbuild. Conventions: a linear's weight W is [out_features,
in_features] and computes y = x W^T + b; a rotation R is [n, n] and turns a row vector,
x -> x R; every product with R is done in float64 by `factored.Rotation` and nowhere else.
"""
