"""A federation of real processes for each test."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.programs import Federation


@pytest.fixture
def federation(rabbit_url: str, tmp_path: Path) -> Iterator[Federation]:
    """Yield a federation of its own name on the session's broker."""
    made = Federation(f"t{uuid.uuid4().hex[:8]}", rabbit_url, tmp_path)
    try:
        yield made
    finally:
        made.close()
