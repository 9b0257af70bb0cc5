"""The content-addressed store: what was made once, by anyone who shares it, is not made again."""
