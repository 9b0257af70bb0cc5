"""What a person can mend: a tensor, a size or an option that cannot be quantized as asked."""

from __future__ import annotations


class QuantError(Exception):
    """A tensor or an option that quantization refuses.

    The message says which tensor or field, what is wrong with it and what to do. Printed
    without a traceback (`buildsys.errors.is_for_people`).
    """
