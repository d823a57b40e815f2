"""How fast it is, and what holds it: timed on the devices at hand, or read from what a compiler made."""
