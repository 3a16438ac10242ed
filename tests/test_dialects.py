"""What is sent beside the messages, by the server that is asked."""

import httpx

from chat.config import Settings
from chat.llm.dialects import parameters

GPT_OSS = "openai/gpt-oss-20b"
REASONING = {"include_reasoning": False, "reasoning_effort": "high"}


def test_each_server_gets_the_parameters_that_it_knows() -> None:
    settings = Settings(groq_api_key="k", max_tokens=7, reasoning_effort="high")
    for name, model, expected in (
        ("api.groq.com", GPT_OSS, {"max_completion_tokens": 7, **REASONING}),
        ("API.Groq.com", "openai/gpt-oss-120b", {"max_completion_tokens": 7, **REASONING}),
        ("api.groq.com", "openai/gpt-oss-safeguard-20b", {"max_completion_tokens": 7}),
        ("api.groq.com", "qwen/qwen3-32b", {"max_completion_tokens": 7}),
        ("api.openai.com", GPT_OSS, {"max_completion_tokens": 7}),
        ("openrouter.ai", GPT_OSS, {"max_completion_tokens": 7}),
        ("localhost", GPT_OSS, {"max_tokens": 7}),
        ("api.groq.com.example", GPT_OSS, {"max_tokens": 7}),
    ):
        host = httpx.URL(f"https://{name}/v1").host
        whole = parameters(host, model, settings, is_stream=False)
        assert whole == {"model": model, **expected}, (name, model)
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        assert parameters(host, model, settings, is_stream=True) == whole | usage
    mistral = parameters("api.mistral.ai", "m", settings, is_stream=True)
    assert mistral == {"model": "m", "max_tokens": 7, "stream": True}
