import inspect
import re

import pytest

from optimum_order import errors


def test_the_tree_is_the_one_its_docstring_draws():
    drawn = dict(re.findall(r"[├└]── (\w+) \((\w+)\)", errors.__doc__))
    classes = {
        name: cls
        for name, cls in vars(errors).items()
        if inspect.isclass(cls)
        and cls.__module__ == errors.__name__
        and cls is not errors.OptimumOrderError
    }
    assert {name: cls.__bases__[1].__name__ for name, cls in classes.items()} == drawn
    assert all(cls.__bases__[0] is errors.OptimumOrderError for cls in classes.values())


def test_every_error_is_caught_by_its_builtin_kind():
    with pytest.raises(ValueError, match="bad order"):
        raise errors.OrderError("bad order")
    with pytest.raises(OSError, match="full"):
        raise errors.OutputError("full")


@pytest.mark.parametrize(
    ("got", "hint"),
    [
        ("wandaa", " Did you mean 'wanda'?"),
        ("sparsgpt", " Did you mean 'sparsegpt'?"),
        ("zzzz", ""),
    ],
)
def test_unknown_suggests_the_nearest_and_lists_what_is_allowed(got, hint):
    message = errors.unknown("method", got, ["wanda", "sparsegpt", "rtn"])
    assert message == f"Unknown method '{got}'.{hint} Allowed: rtn, sparsegpt, wanda."


@pytest.mark.parametrize(
    "text",
    [
        "my-secret",
        "Authorization: Bearer my-secret",
        "bearer anything",
        "hf_AbCdEfGh0123",
        "eyJhbGci.eyJzdWIi.c2ln",
    ],
)
def test_nothing_that_looks_like_a_token_is_told(text):
    told = errors.redacted(f"refused: {text}", "my-secret", None)
    assert "***" in told and not any(
        word in told for word in ("my-secret", "anything", "hf_", "eyJ")
    )


def test_what_is_no_token_stays():
    text = "set HF_HUB_OFFLINE=0, or use hf_hub; the model eyJ is not there"
    assert errors.redacted(text, None, "") == text


def test_an_error_is_chained_unless_its_traceback_shows_a_secret():
    def caught(message):
        try:
            try:
                raise KeyError(message)
            except KeyError as cause:
                raise ValueError("no") from cause
        except ValueError as error:
            return error

    harmless, telling = caught("a reason"), caught("Bearer abc")
    assert errors.chainable(harmless, "my-secret") is harmless
    assert errors.chainable(telling, "my-secret") is None
    assert errors.chainable(caught("my-secret"), "my-secret") is None
