"""What headers say of a model's quota: https://console.groq.com/docs/rate-limits"""

import re
from collections.abc import Mapping
from math import ceil

SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400}
DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h|d)")
LONGEST = 86_400  # seconds; Groq's windows are a minute and a day


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as `2m59.56s`, at most a day; 0 if it is malformed."""
    parts = DURATION.findall(text)
    seconds = sum(float(number) * SECONDS[unit] for number, unit in parts)
    return min(seconds, LONGEST) if "".join(map("".join, parts)) == text else 0.0


def retry_after(headers: Mapping[str, str]) -> int:
    """Return for how many seconds the server asks for no further request; 0 if it does not."""
    return ceil(parse_duration(headers.get("retry-after", "") + "s"))


def exhausted_for(status: int, headers: Mapping[str, str]) -> float:
    """Return for how many seconds the model should not be asked, by the headers of a response."""
    wait: float = retry_after(headers) if status == 429 else 0
    for kind in ("requests", "tokens"):
        if headers.get(f"x-ratelimit-remaining-{kind}") == "0":
            wait = max(wait, parse_duration(headers.get(f"x-ratelimit-reset-{kind}", "")))
    return wait
