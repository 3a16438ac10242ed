"""What is kept: conversations, in this process or in Redis."""
