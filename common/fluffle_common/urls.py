"""The URL of a broker, or of several brokers of one cluster: what ``--url`` may say."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fluffle_common.errors import UsageError

if TYPE_CHECKING:
    from yarl import URL

# A password or a vhost may hold a comma too; it separates only where another URL begins.
_BETWEEN = re.compile(r"\s*,\s*(?=amqps?://)")


def split_urls(text: str) -> list[str]:
    """Split comma-separated URLs, at least one, in their order.

    >>> split_urls("amqp://me:a,b@one/v, amqp://me:a,b@two/v")
    ['amqp://me:a,b@one/v', 'amqp://me:a,b@two/v']
    """
    return _BETWEEN.split(text.strip())


def parse_urls(text: str) -> list[URL]:
    """Check the URL of a broker, or of several of one cluster.

    Raises:
        UsageError: saying what is wrong with it.
    """
    urls = [_parse(url) for url in split_urls(text)]
    if len({url.path for url in urls}) > 1:
        raise UsageError(
            "the brokers of one cluster have the same vhosts; "
            "let every URL in --url end in the same /vhost"
        )
    return urls


def shown(url: URL) -> str:
    """Return a URL for messages to people, without user and password."""
    return str(url.with_password(None).with_user(None).with_query(None))


def _parse(url: str) -> URL:
    from yarl import URL

    try:
        split = urlsplit(url)
        if split.scheme not in ("amqp", "amqps"):
            raise ValueError(f"it starts with '{split.scheme}://'" if split.scheme else "no scheme")
        if not split.hostname:
            raise ValueError("no host")
        if "," in split.hostname:
            raise ValueError("a comma in the host; of several brokers, write each as a whole URL")
        _ = split.port  # raises where it is not a number
        return URL(url)
    except ValueError as wrong:
        raise UsageError(
            f"'{url}' is not the URL of a broker ({wrong}); "
            "write amqp://user:password@host:port/vhost or amqps://…"
        ) from None
