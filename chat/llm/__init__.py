"""Groq, or any server that speaks OpenAI's API."""
