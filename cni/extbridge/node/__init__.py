"""What a node has: the launcher's words, and the agent."""
