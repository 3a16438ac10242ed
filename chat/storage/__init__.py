"""What is kept: conversations (a `chat.service.History`), in this process or in Redis."""
