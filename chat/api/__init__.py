"""What clients touch: HTTP, event streams, WebSockets, limits and the chat page."""
