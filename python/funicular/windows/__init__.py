"""One offloaded model: its session, its windows, its hooks, and how it ends."""
