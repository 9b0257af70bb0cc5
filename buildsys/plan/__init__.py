"""Recipe to Plan: the graph of artifacts. Pure: touches no file."""
