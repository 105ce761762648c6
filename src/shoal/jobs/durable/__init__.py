"""What a job keeps: which rows are finished, whose files these are, and that both survive whatever happens."""
