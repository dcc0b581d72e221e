"""The average of the weights: what it is, where it is kept, and when it is used."""

from types import SimpleNamespace

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from lavit_hf.training.pixel_decoder.trainer import AveragedNetworks, AveragingCallback


@pytest.fixture
def networks() -> nn.Module:
    torch.manual_seed(0)
    networks = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    networks[0].bias.requires_grad_(False)
    return networks


@torch.no_grad()
def change(networks: nn.Module) -> None:
    for value in networks.parameters():
        value.add_(torch.randn_like(value))


def test_it_is_that_of_diffusers(networks):
    model = AveragedNetworks(networks, decay=0.6)  # reached after 11 updates
    trained = [value for value in networks.parameters() if value.requires_grad]
    expected = EMAModel(trained, decay=0.6)
    for _ in range(20):
        change(networks)
        model.update_average()
        expected.step(trained)
        for average, shadow in zip(model.average.module, expected.shadow_params, strict=True):
            torch.testing.assert_close(average, shadow)


def test_it_is_restored_with_the_module_and_not_trained(networks):
    model = AveragedNetworks(networks, decay=0.6)
    for _ in range(3):
        change(networks)
        model.update_average()
    restored = AveragedNetworks(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).requires_grad_(False), None)
    assert restored.average is None and len(restored.trained) == 0
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    other[0].bias.requires_grad_(False)
    restored = AveragedNetworks(other, decay=0.6)
    restored.load_state_dict(model.state_dict())
    assert {name for name, value in model.named_parameters() if value.requires_grad} == {
        "networks.0.weight",
        "networks.1.weight",
        "networks.1.bias",
    }
    for one in (model, restored):
        with torch.no_grad():
            one.networks[1].bias.fill_(1.0)
        one.update_average()
    assert all(torch.equal(*pair) for pair in zip(model.average.module, restored.average.module, strict=True))


def test_weights_come_back_after_the_averaged_ones_were_used(networks):
    model = AveragedNetworks(networks, decay=0.6)
    for _ in range(2):
        change(networks)
        model.update_average()
    before = [value.clone() for value in networks.parameters()]
    with model.averaged():
        averaged = networks[0].weight.clone()
    assert torch.equal(averaged, model.average.module[0]) and not torch.equal(averaged, before[0])
    assert all(torch.equal(value, old) for value, old in zip(networks.parameters(), before, strict=True))
    model.use_average()
    assert torch.equal(networks[0].weight, averaged) and torch.equal(networks[0].bias, before[1])


def test_updates_that_a_gradient_scaler_skips_do_not_count(networks):
    model, callback = AveragedNetworks(networks, decay=0.6), AveragingCallback()
    for was_skipped in (True, False, True):
        optimizer = SimpleNamespace(step_was_skipped=was_skipped)
        callback.on_optimizer_step(None, None, None, model=model, optimizer=optimizer)
    assert model.average.n_averaged == 1


def test_options_of_checkpointing_are_not_ignored(networks):
    with pytest.raises(ValueError, match="`gradient_checkpointing_kwargs` do nothing here"):
        AveragedNetworks(networks, None).gradient_checkpointing_enable({"use_reentrant": True})
