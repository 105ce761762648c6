"""What stands between text and the engine: prompts on their way in, answers on their way out, turns of threads."""
