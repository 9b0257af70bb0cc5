"""What is stale, in what order, where it runs."""
