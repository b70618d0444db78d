"""`--cards FOLDER` keeps what these tests measure as verification cards."""

import jax
import pytest

from experiments.cards import write_card


@pytest.fixture(scope="session")
def card(request):
    """Write a card of this device with `--cards`: (model, task, figures), after assertions."""
    folder, device = request.config.getoption("--cards"), jax.devices()[0]
    name = "CPU" if device.platform == "cpu" else device.device_kind
    command = 'make parity PYTEST_ARGS="--cards experiments/cards"'
    return lambda model, task, figures: (
        folder and write_card(folder, model, task, name, command, figures)
    )
