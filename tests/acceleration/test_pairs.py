"""The table of docs/acceleration_models.md is what happens; its rows are made by `tests.acceleration.pairs`."""

import pytest
import torch

from tests.acceleration.pairs import FILE, MODELS, line


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def test_the_table_has_a_row_for_each_model() -> None:
    rows = [row.split(" | ")[0].removeprefix("| ") for row in FILE.read_text().splitlines() if row.startswith("| ")]
    assert rows == ["model", *MODELS]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_accelerations_and_their_pairs(name: str) -> None:
    assert line(name) in FILE.read_text().splitlines()
