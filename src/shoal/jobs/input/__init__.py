"""What a job reads: rows from JSON lines, tables and streams, and a table put together again with its answers."""
