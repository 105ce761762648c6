"""Schemas, grammars and the like -> which tokens may come next, by way of llguidance, which nothing else imports."""
