"""URLs as messages may show them: without what nobody should read, a login or a signature."""

from __future__ import annotations

import re

_LOGIN = re.compile(r"(?<=://)[^/?#\s]*@")
_QUERY = re.compile(r"(?<=://)([^\s?'\"]*)\?[^\s'\"]*")


def is_web(url: str) -> bool:
    """Whether a web server is asked for it."""
    return url.startswith(("http://", "https://"))


def shown(url: str) -> str:
    """A URL without its login, and if a web server is asked for it without what follows a ``?``. A path stays as it is."""
    bare = _LOGIN.sub("", url)
    return bare.partition("?")[0] if is_web(url) else bare


def told(error: BaseException, url: str) -> str:
    """What a library says of a request for ``url``, with this and other URLs in it as ``shown``."""
    text = str(error).replace(url, shown(url))
    for login in _LOGIN.findall(url):  # also in what a path is called there, which is no URL
        text = text.replace(login, "")
    text = _LOGIN.sub("", text)
    return (_QUERY.sub(r"\1", text) if is_web(url) else text) or type(error).__name__
