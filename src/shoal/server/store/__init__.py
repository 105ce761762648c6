"""Files and batches on the disk, and what works the batches off. Nothing here knows of HTTP."""
