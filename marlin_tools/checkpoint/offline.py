"""Whether the hub can be asked, found out once and within seconds, before a library retries for a minute in many lines."""

import sys
import threading
from functools import cache

WAIT = 5.0
"""Seconds in which the hub has to answer anything at all."""


def give_up_early() -> None:
    """Where the hub does not answer, tell the libraries that read from it to be offline: they look into its cache at once."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not hub_answers():
        constants.HF_HUB_OFFLINE = True
        if (loaded := sys.modules.get("datasets")) is not None:  # it copies the constant when it is imported
            loaded.config.HF_HUB_OFFLINE = True


@cache
def hub_answers() -> bool:
    """One request without retries. Looking up a name cannot be bounded, so a thread does it and is left behind if need be."""
    answered = threading.Event()

    def ask() -> None:
        import httpx
        from huggingface_hub import constants

        try:
            httpx.head(constants.ENDPOINT, timeout=WAIT)
        except (httpx.HTTPError, OSError):
            return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(WAIT)
    return answered.is_set()
