"""The command line: ``main`` finds the verb, one thin file a verb does it."""
