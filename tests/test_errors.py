"""The tree of errors: each class knows its status, and none says too much."""

import inspect

from chat import errors
from chat.errors import ChatError


def classes() -> list[type[ChatError]]:
    found = [x for x in vars(errors).values() if inspect.isclass(x) and issubclass(x, ChatError)]
    return found[1:]


def test_every_error_has_a_status_a_reason_and_a_place_in_the_drawing() -> None:
    assert classes()
    for each in classes():
        assert each.status in (200, 400, 403, 404, 408, 413, 429, 499, 500, 502, 503, 504)
        assert each.close_code in (None, 1001, 1003, 1008, 1009, 1011, 1012, 1013)
        assert each.reason.isidentifier()
        assert each.__name__ in (errors.__doc__ or "")
