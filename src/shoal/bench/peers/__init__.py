"""``shoal bench peers``: other programs on the same file, in turns."""
