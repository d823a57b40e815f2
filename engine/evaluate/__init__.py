"""How well pictures follow their prompts."""
