"""How well pictures follow their prompts, and how near they come to real ones."""
