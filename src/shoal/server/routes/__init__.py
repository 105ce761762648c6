"""What the server answers, a family of routes in each file."""
