"""The drawn world, grown up: what the next shipped model learns. Words on one side, pictures on the other."""
