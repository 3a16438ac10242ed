"""A dict that forgets what was least recently of use."""

from chat.recent import Recent


def test_beyond_the_limit_the_least_recently_set_goes_first() -> None:
    recent = Recent[str, int](2)
    for number, key in enumerate(["a", "b", "a", "c"]):
        recent[key] = number
    assert (recent.get("a"), recent.get("b"), recent.get("c")) == (2, None, 3)


def test_what_is_found_stays() -> None:
    recent = Recent[str, int](2)
    recent["a"], recent["b"] = 0, 1
    assert recent.get("a") == 0
    recent["c"] = 2
    assert "a" in recent
    assert "b" not in recent
