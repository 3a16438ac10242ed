"""An anonymous chat service in front of Groq's LLM API."""
