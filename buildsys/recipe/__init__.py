"""YAML text to a Recipe: located errors, variables, extends, matrix, schema."""
