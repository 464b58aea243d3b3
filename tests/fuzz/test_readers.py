"""Readers of everything on disk against mutations of valid files, with a fixed number of inputs each."""

from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzzing import READERS, mutated, place, survives


@pytest.mark.parametrize("name", READERS)
def test_what_is_valid_is_read(tmp_path: Path, name: str) -> None:
    reader = READERS[name]
    folder = place(reader, tmp_path / "model")
    for content in reader.valid:
        if name not in {"journal", "quantization_config", "manifest"}:
            assert "read" == survives(reader, folder, content)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.timeout(120)
def test_no_input_raises_what_is_not_ours(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    reader = READERS[name]
    folder = place(reader, tmp_path_factory.mktemp("fuzz") / "model")

    @settings(max_examples=25 if reader.slow else 150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(reader.valid), st.integers(0, 2**32))
    def read(valid: bytes, seed: int) -> None:
        survives(reader, folder, mutated(valid, Random(seed)))

    read()
