"""A hook of a purpose takes the place of the one before, and of no other."""

import torch
from torch import nn

from optimum_order.models import hooks


def adding(module, value):
    return lambda: module.register_forward_hook(lambda m, args, output: output + value)


def test_a_new_hook_takes_the_place_of_the_one_before_it():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    x = torch.zeros(1)
    assert not hooks.is_hooked(model, "_one")
    for value in (1, 2):
        hooks.replace(model[1], "_one", adding(model[1], value))
        assert model(x).item() == value
    hooks.replace(model[1], "_other", adding(model[1], 10))
    assert model(x).item() == 12 and hooks.is_hooked(model, "_one")
    for _ in range(2):
        hooks.replace(model[1], "_one", None)
        assert model(x).item() == 10
    assert not hooks.is_hooked(model, "_one") and hooks.is_hooked(model, "_other")
