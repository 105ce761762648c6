"""Jobs and the server on many machines, on a Ray cluster (``pip install 'shoal[ray]'``). Nothing below knows of it."""
