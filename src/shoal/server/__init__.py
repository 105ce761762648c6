"""The HTTP server: many clients' requests through one engine."""
