"""Mistakes in models and samples that a person can mend: which file, tensor or field."""

from __future__ import annotations

from buildsys.formats.errors import Misfit


class ModelError(Misfit):
    """A model folder, or a sample for a model, is not what it should be.

    Printed without a traceback (`buildsys.errors.is_for_people`).
    """
