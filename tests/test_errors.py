"""The tree of errors: each class has its status, and its place in the drawing."""

import re

from chat import errors
from chat.errors import ChatError


def classes(root: type[ChatError] = ChatError) -> list[type[ChatError]]:
    return [root, *(found for each in root.__subclasses__() for found in classes(each))]


def test_every_error_is_in_the_drawing_with_its_status_and_close_code() -> None:
    drawing = errors.__doc__ or ""
    assert len(classes()) > 20
    for error in classes()[1:]:
        status = f" {error.status}" if "status" in vars(error) and error.status >= 400 else ""
        close_code = f"/{error.close_code}" if "close_code" in vars(error) else ""
        told = f"{error.__name__}{status or ' ' * bool(close_code)}{close_code}"
        assert re.search(rf"\b{told}\b", drawing), told
        assert error.reason.isidentifier()
