"""What models say beyond text (tool calls, reasoning), and what conversations may hold beyond it."""
