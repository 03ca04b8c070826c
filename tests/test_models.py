from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from kdpipe.checkpoint import num_parameters
from kdpipe.errors import ConfigError
from kdpipe.models.linear import Linear
from kdpipe.models.mlp import MLP
from kdpipe.models.resnet import ResNet

MODELS = {
    "linear": lambda shape: Linear(shape, 7),
    "mlp": lambda shape: MLP(shape, 7, hidden=[16, 8], dropout=0.2),
    "resnet": lambda shape: ResNet(shape, 7, depth=8, width=4),
    "resnet, stride 2": lambda shape: ResNet(shape, 7, depth=14, width=4, stem_stride=2),
}
EVERY_MODEL = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


@EVERY_MODEL
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 17, 30)])
@pytest.mark.parametrize("num_rows", [2, 5])
def test_logits_per_row(build, shape, num_rows):
    inputs = torch.randn(num_rows, *shape)
    assert build(shape)(inputs).shape == (num_rows, 7)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28)])
@pytest.mark.parametrize("name", ["linear", "mlp", "resnet"])
def test_a_batch_of_one_trains(name, shape):
    model = MODELS[name](shape).train()
    logits = model(torch.randn(1, *shape))
    nn.functional.cross_entropy(logits, torch.zeros(1, dtype=torch.int64)).backward()
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    assert any(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@EVERY_MODEL
def test_every_parameter_learns(build):
    torch.manual_seed(0)
    model = build((1, 16, 16))
    nn.functional.cross_entropy(model(torch.randn(8, 1, 16, 16)), torch.arange(8) % 7).backward()
    idle = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert not idle


@EVERY_MODEL
def test_rows_do_not_meet_in_evaluation(build):
    model, inputs = build((1, 12, 12)).eval(), torch.randn(6, 1, 12, 12)
    with torch.inference_mode():
        together, alone = model(inputs), torch.cat([model(row.unsqueeze(0)) for row in inputs])
        again = model(inputs)
    torch.testing.assert_close(together, alone)
    assert torch.equal(together, again)
    assert (together[0] - together[1]).abs().max() > 1e-4


@pytest.mark.parametrize("shape", [(5,), (3, 4), (3, 8, 8)])
@pytest.mark.parametrize("hidden", [[], [6], [6, 9]])
def test_parameter_counts_of_linear_and_mlp(shape, hidden):
    num_inputs = int(torch.ones(shape).numel())
    assert num_parameters(Linear(shape, 4)) == (num_inputs + 1) * 4
    widths = [num_inputs, *hidden, 4]
    expected = sum((width_in + 1) * width_out for width_in, width_out in itertools.pairwise(widths))
    assert num_parameters(MLP(shape, 4, hidden=hidden)) == expected


def test_mlp_without_hidden_layers_is_linear():
    mlp, linear = MLP((2, 3), 4, hidden=[]), Linear((2, 3), 4)
    linear.head.load_state_dict(mlp.layers[0].state_dict())
    inputs = torch.randn(5, 2, 3)
    assert torch.equal(mlp(inputs), linear(inputs))


def test_mlp_drops_units_in_training_only():
    model, inputs = MLP((4,), 3, hidden=[32], dropout=0.5), torch.randn(2, 4)
    assert not torch.equal(model(inputs), model(inputs))
    model.eval()
    assert torch.equal(model(inputs), model(inputs))


@pytest.mark.parametrize(("depth", "num_weights"), [(20, 272_474), (32, 466_906), (56, 855_770)])
def test_parameter_counts_of_cifar_resnets(depth, num_weights):
    # He et al. 2015, table 6 (0.27, 0.46 and 0.85 million), with projections where the width changes.
    assert num_parameters(ResNet((3, 32, 32), 10, depth=depth)) == num_weights


@pytest.mark.parametrize("depth", [8, 14, 20, 44])
@pytest.mark.parametrize("width", [1, 6])
def test_depth_counts_layers_and_width_the_first_stage(depth, width):
    model = ResNet((1, 8, 8), 3, depth=depth, width=width)
    convolutions = [each for each in model.modules() if isinstance(each, nn.Conv2d) and each.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == depth
    assert sorted({each.out_channels for each in convolutions}) == [width, 2 * width, 4 * width]
    assert model.head.in_features == 4 * width


@pytest.mark.parametrize("stem_stride", [1, 2])
def test_stages_halve_the_resolution(stem_stride):
    model = ResNet((1, 32, 32), 3, depth=8, width=2, stem_stride=stem_stride)
    features = model.blocks(model.stem(torch.randn(2, 1, 32, 32)))
    assert features.shape == (2, 8, 8 // stem_stride, 8 // stem_stride)


@pytest.mark.parametrize("depth", [-4, 0, 2, 7, 9, 18, 51])
def test_resnet_refuses_other_depths(depth):
    with pytest.raises(ConfigError, match=rf"depth is {depth}; expected 6n \+ 2: 8, 14, 20"):
        ResNet((1, 8, 8), 3, depth=depth)
