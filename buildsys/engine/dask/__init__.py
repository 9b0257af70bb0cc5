"""Steps on other processes and machines, by Dask distributed (the extra `[dask]`)."""
