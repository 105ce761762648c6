"""``shoal bench jobs``: what durability costs and what shared prompts gain."""
