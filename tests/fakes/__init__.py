"""Stand-ins for servers that tests must not need a network for."""
