"""What a family looks like: which norm feeds which linear, what rotates how."""
