"""What is sent beside the messages, by the server that is asked."""

from chat.config import Settings
from chat.llm.dialects import parameters, stream_parameters

GPT_OSS = "openai/gpt-oss-20b"
REASONING = {"include_reasoning": False, "reasoning_effort": "high"}


def test_each_server_gets_the_parameters_that_it_knows() -> None:
    settings = Settings(groq_api_key="k", max_tokens=7, reasoning_effort="high")
    for host, model, expected in (
        ("api.groq.com", GPT_OSS, {"max_completion_tokens": 7, **REASONING}),
        ("API.Groq.com", "openai/gpt-oss-120b", {"max_completion_tokens": 7, **REASONING}),
        ("api.groq.com", "openai/gpt-oss-safeguard-20b", {"max_completion_tokens": 7}),
        ("api.groq.com", "qwen/qwen3-32b", {"max_completion_tokens": 7}),
        ("api.openai.com", GPT_OSS, {"max_completion_tokens": 7}),
        ("openrouter.ai", GPT_OSS, {"max_completion_tokens": 7}),
        ("localhost", GPT_OSS, {"max_tokens": 7}),
        ("api.groq.com.example", GPT_OSS, {"max_tokens": 7}),
    ):
        assert parameters(host, model, settings) == {"model": model, **expected}, (host, model)
    usage = {"stream_options": {"include_usage": True}}
    assert stream_parameters("localhost") == {"stream": True, **usage}
    assert stream_parameters("api.mistral.ai") == {"stream": True}
