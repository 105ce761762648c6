"""URLs in messages: nobody reads a login or a signature there."""

from __future__ import annotations

import pytest

from shoal.jobs.durable.urls import shown, told


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://me:secret@host/in/a.jsonl?sig=secret", "https://host/in/a.jsonl"),
        ("https://host/@me/a.jsonl?mail=me@host", "https://host/@me/a.jsonl"),
        ("s3://me:se@cret@bucket/in/a?.jsonl", "s3://bucket/in/a?.jsonl"),
        ("zip://a::ftp://me:secret@host/b", "zip://a::ftp://host/b"),
        ("in/me@host/a?.jsonl", "in/me@host/a?.jsonl"),
        ("", ""),
    ],
)
def test_a_url_is_shown_without_login_and_signature(url: str, expected: str) -> None:
    assert shown(url) == expected


def test_what_a_library_says_is_told_without_them_too() -> None:
    web = "https://me:secret@host/a b.jsonl?sig=secret 1"
    for text in (web, "https://me:secret@host/a%20b.jsonl?sig=secret%201", "https://host/a%20b.jsonl?sig=secret"):
        assert "secret" not in told(OSError(f"403, url='{text}'"), web)
    assert told(OSError("403, url='https://host/a?sig=secret', sorry"), web) == "403, url='https://host/a', sorry"
    assert told(ValueError("no bucket me:secret@b"), "s3://me:secret@b/in/a?.csv") == "no bucket b"
    assert told(OSError("s3://b/a?.csv is absent"), "s3://b/a?.csv") == "s3://b/a?.csv is absent"
    assert told(TimeoutError(), web) == "TimeoutError"
