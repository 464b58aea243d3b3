"""A hub that does not answer costs seconds and one line, not a minute of retries."""

import socket
import time
from collections.abc import Iterator

import pytest

from marlin_tools.checkpoint import offline
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.data.sources import find_corpus
from marlin_tools.errors import DataError, ModelError


def looks_for_long(*_args: object, **_options: object) -> None:
    """A name that nobody knows, which takes a minute to find out."""
    time.sleep(60)
    raise OSError("unknown name")


@pytest.fixture(params=["refused", "silent", "unknown name"])
def deaf(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody listens there, somebody listens and says nothing, or there is no such machine."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "silent":
            server.listen()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        if request.param == "unknown name":
            endpoint = "http://localhost.invalid"
            monkeypatch.setattr("socket.getaddrinfo", looks_for_long)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(offline, "WAIT", 1.0)
        offline.hub_answers.cache_clear()
        yield
    offline.hub_answers.cache_clear()


@pytest.mark.usefixtures("deaf")
def test_a_hub_that_does_not_answer_is_given_up_early() -> None:
    begin = time.perf_counter()
    with pytest.raises(DataError, match="not in the hub cache, and the hub does not answer") as refusal:
        list(find_corpus("c4")().documents)

    assert time.perf_counter() - begin < 10
    assert 1 == len(refusal.value.lines)


@pytest.mark.usefixtures("deaf")
def test_nor_is_it_asked_for_a_model() -> None:
    begin = time.perf_counter()
    with pytest.raises(ModelError, match="`nobody/nothing` is not in the local cache and cannot be downloaded"):
        Checkpoint.open("nobody/nothing")

    assert time.perf_counter() - begin < 10


def test_a_hub_that_answers_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    offline.hub_answers.cache_clear()
    monkeypatch.setattr(httpx, "head", lambda *_args, **_options: httpx.Response(404))
    assert offline.hub_answers()
    offline.hub_answers.cache_clear()
