"""An anonymous chat service in front of Groq's LLM API.

service   one turn of a chat, over:   prompt    which exchanges go along
reply     a reply in progress         tokens    token counts
replies   those that outlive their connection, each of them `kept`
messages  what clients send           errors, config, logs, metrics
api/      what clients touch: HTTP, event streams, WebSockets, limits, the chat page
storage/  what is kept: conversations, in this process or in Redis
llm/      whom it asks: Groq, with retries, a circuit breaker and a fallback
"""

__version__ = "1.0.0"
