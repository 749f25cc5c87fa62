import pytest
from torch import nn

from deltaw.layers.tree import evaluating, to_train


def mixed() -> nn.Module:
    """In training mode but for one module, as a user leaves a frozen batch norm."""
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())).train()
    model[1][0].eval()
    return model


def test_each_module_gets_its_own_mode_back() -> None:
    model = mixed()
    before = [m.training for m in model.modules()]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == before


def test_after_an_error_too() -> None:
    model = mixed()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert model.training and not model[1][0].training


def test_norms_with_running_statistics_stay_as_they_are() -> None:
    model = nn.Sequential(
        nn.Dropout(), nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False), nn.LayerNorm(2)
    )
    to_train(model.eval())
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
