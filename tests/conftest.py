"""What every test can use: a private RabbitMQ, and Hypothesis that repeats itself."""

import asyncio
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator

import pytest
import uvloop
from hypothesis import HealthCheck, settings

from fluffle_broker.node import node
from fluffle_common.errors import BrokerError
from tests.shared import shared_node

# The same examples every time, however slowly they come, since the machine is shared.
# HYPOTHESIS_PROFILE names another profile: fewer examples for `make test-fast`, or a long search.
settings.register_profile(
    "ci",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
    max_examples=60,
    stateful_step_count=40,
    database=None,
)
settings.register_profile("fast", settings.get_profile("ci"), max_examples=20)
settings.register_profile(
    "search", deadline=None, max_examples=5000, stateful_step_count=80, print_blob=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# A run in the background ignores SIGINT, and so would every program that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Let tests run on the event loop that the programs run on."""
    return {"uvloop": uvloop.new_event_loop}


def pytest_collection_finish() -> None:
    """Spare the garbage collector the modules and the tests: they stay until the end."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _forget_modules_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let no test find a module that another has written, imported, and left."""
    before, written = set(sys.modules), str(tmp_path_factory.getbasetemp())
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(written):
            del sys.modules[name]


@pytest.fixture(scope="module")
def compiled_elsewhere(pytestconfig: pytest.Config) -> Iterator[None]:
    """Let JAX compile quickly, since the models are tiny, and keep it for the next run of tests."""
    import jax

    assert pytestconfig.cache is not None
    changed = {
        "jax_compilation_cache_dir": str(pytestconfig.cache.mkdir("jax")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in changed}
    for name, value in changed.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def broker_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[node.NodeInfo]:
    """Run one private RabbitMQ for all jobs; tests keep apart by their federation."""
    with contextlib.ExitStack() as stack:
        try:
            info = stack.enter_context(shared_node(tmp_path_factory, "rabbit"))
        except BrokerError as why:
            if os.environ.get("CI") == "true":
                pytest.fail(f"CI must test against a real RabbitMQ, and none can be started: {why}")
            pytest.skip(f"NOT TESTED against a real RabbitMQ, none can be started here: {why}")
        yield info


@pytest.fixture
def rabbit_url(broker_node: node.NodeInfo) -> str:
    """Return the URL of the session's RabbitMQ."""
    return broker_node.url
