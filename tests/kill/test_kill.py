"""Fifteen runs that are killed, continued, and have to end with the same bytes: `campaign.py`, as `make kill` runs it."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_fifteen_kills_lose_nothing() -> None:
    script = Path(__file__).with_name("campaign.py")
    done = subprocess.run(
        [sys.executable, str(script), "--count", "15", "--seed", "7"], capture_output=True, text=True, check=False
    )

    assert 0 == done.returncode, done.stdout + done.stderr
    assert "15 kills" in done.stdout
