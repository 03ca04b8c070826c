from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from kdpipe.checkpoint import num_parameters
from kdpipe.errors import ConfigError
from kdpipe.models.linear import Linear
from kdpipe.models.lstm import LSTM
from kdpipe.models.mlp import MLP
from kdpipe.models.mobilenet import MobileNetV2
from kdpipe.models.resnet import ResNet
from kdpipe.models.transformer import Transformer

MODELS = {
    "linear": lambda shape: Linear(shape, 7),
    "mlp": lambda shape: MLP(shape, 7, hidden=[16, 8], dropout=0.2),
    "resnet": lambda shape: ResNet(shape, 7, depth=8, width=4),
    "resnet, stride 2": lambda shape: ResNet(shape, 7, depth=14, width=4, stem_stride=2),
    "mobilenet": lambda shape: MobileNetV2(shape, 7, width=0.25),
}
EVERY_MODEL = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


@EVERY_MODEL
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 17, 30)])
@pytest.mark.parametrize("num_rows", [2, 5])
def test_logits_per_row(build, shape, num_rows):
    inputs = torch.randn(num_rows, *shape)
    assert build(shape)(inputs).shape == (num_rows, 7)


@pytest.mark.parametrize("shape", [(1, 12, 12), (1, 28, 28)])
@pytest.mark.parametrize("name", ["linear", "mlp", "resnet", "mobilenet"])
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
    model, inputs = build((1, 12, 12)), torch.randn(6, 1, 12, 12)
    with torch.inference_mode():
        for _ in range(50):
            model(inputs)  # batch normalisation learns what is usual
        model.eval()
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


@pytest.mark.parametrize(("width", "num_weights"), [(1.4, 6_108_776), (1.0, 3_504_872), (0.35, 1_677_128)])
def test_parameter_counts_of_mobilenets(width, num_weights):
    # Those of torchvision's mobilenet_v2 (Sandler et al. 2018, table 4: 6.9, 3.4 and 1.7 million).
    assert num_parameters(MobileNetV2((3, 224, 224), 1000, width=width)) == num_weights


@pytest.mark.parametrize("stem_stride", [1, 2])
def test_stages_of_a_mobilenet_halve_the_resolution_three_times(stem_stride):
    model = MobileNetV2((3, 32, 32), 3, width=0.25, stem_stride=stem_stride).eval()
    features, shapes = model.stem(torch.randn(2, 3, 32, 32)), []
    for stage in model.stages:
        features = stage(features)
        shapes.append((features.shape[1], features.shape[2] * stem_stride))
    assert shapes == [(8, 32), (8, 32), (8, 16), (16, 8), (24, 8), (40, 4), (80, 4)]


def test_convolutions_of_a_mobilenet_meet_channels_one_by_one_or_at_one_place():
    wide = [each for each in MobileNetV2((1, 8, 8), 3).stages.modules() if isinstance(each, nn.Conv2d)]
    assert len(wide) == 3 * 17 - 1
    assert all((each.kernel_size == (3, 3)) == (each.groups == each.in_channels > 1) for each in wide)


@pytest.mark.parametrize("width", [0, -0.5, float("nan")])
def test_a_mobilenets_width_is_above_0(width):
    with pytest.raises(ConfigError, match=f"width is {width}; expected a factor above 0"):
        MobileNetV2((1, 8, 8), 3, width=width)


# Text

TEXT_MODELS = {
    "lstm": lambda: LSTM(30, 7, width=12, hidden=10),
    "lstm, deep": lambda: LSTM(30, 7, width=12, hidden=10, layers=2, dropout=0.2),
    "lstm, one way": lambda: LSTM(30, 7, width=12, hidden=10, bidirectional=False),
    "transformer": lambda: Transformer(30, 7, max_length=16, width=12, heads=2),
}
EVERY_TEXT_MODEL = pytest.mark.parametrize("build", TEXT_MODELS.values(), ids=TEXT_MODELS)
LENGTHS = torch.tensor([6, 1, 3, 4])


def texts(lengths=LENGTHS, width=6, padding=0):
    """Token ids `[B, T]` and their mask."""
    ids = torch.randint(1, 30, (len(lengths), 16), generator=torch.Generator().manual_seed(0))[:, :width]
    mask = (torch.arange(width) < lengths.unsqueeze(1)).long()
    return {"input_ids": torch.where(mask == 1, ids, padding), "attention_mask": mask}


@EVERY_TEXT_MODEL
def test_padding_changes_nothing(build):
    model = build().eval()
    with torch.inference_mode():
        logits = model(**texts())
        torch.testing.assert_close(model(**texts(width=16)), logits)
        torch.testing.assert_close(model(**texts(padding=29)), logits)
        alone = [model(**texts(LENGTHS[row : row + 1], int(LENGTHS[row]))) for row in (0,)]
    torch.testing.assert_close(torch.cat(alone), logits[:1])
    assert logits.shape == (4, 7)


@EVERY_TEXT_MODEL
def test_texts_do_not_meet_in_evaluation(build):
    model, inputs = build().eval(), texts()
    with torch.inference_mode():
        together = model(**inputs)
        for row, length in enumerate(LENGTHS.tolist()):
            alone = model(**{name: each[row : row + 1, :length] for name, each in inputs.items()})
            torch.testing.assert_close(alone, together[row : row + 1])


@EVERY_TEXT_MODEL
def test_every_token_counts_and_so_does_its_place(build):
    model, inputs = build().eval(), texts()
    with torch.inference_mode():
        logits = model(**inputs)
        for place in range(6):
            other = inputs["input_ids"].clone()
            other[0, place] = other[0, place] % 29 + 1
            changed = (model(other, inputs["attention_mask"])[0] - logits[0]).abs().max()
            assert changed > 1e-5, place
        swapped = inputs["input_ids"].clone()
        swapped[0, :2] = swapped[0, :2].flip(0)
        assert (model(swapped, inputs["attention_mask"])[0] - logits[0]).abs().max() > 1e-5


@EVERY_TEXT_MODEL
def test_a_text_without_tokens_has_finite_logits_and_gradients(build):
    model = build()
    logits = model(**texts(torch.tensor([0, 2]), width=3))
    nn.functional.cross_entropy(logits, torch.tensor([1, 2])).backward()
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@EVERY_TEXT_MODEL
def test_every_parameter_of_a_text_model_learns(build):
    torch.manual_seed(0)
    model = build()
    nn.functional.cross_entropy(model(**texts()), torch.arange(4)).backward()
    idle = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert not idle
    embedding = model.embedding if isinstance(model, LSTM) else model.tokens
    assert not embedding.weight.grad[0].any(), "padding is no token"


def test_the_backward_direction_reads_each_row_from_its_last_token():
    torch.manual_seed(0)
    model, reference = LSTM(30, 7, width=12, hidden=10).eval(), nn.LSTM(12, 10, batch_first=True, bidirectional=True)
    forward, backward = model.layers[0].directions
    weights = {f"{name}{suffix}": each for layer, suffix in ((forward, ""), (backward, "_reverse"))
               for name, each in layer.state_dict().items()}  # fmt: skip
    reference.load_state_dict(weights)
    inputs = texts()
    embedded = model.embedding(inputs["input_ids"])
    packed = nn.utils.rnn.pack_padded_sequence(embedded, LENGTHS, batch_first=True, enforce_sorted=False)
    states, _ = nn.utils.rnn.pad_packed_sequence(reference(packed)[0], batch_first=True)
    means = states.sum(dim=1) / LENGTHS.unsqueeze(1)
    torch.testing.assert_close(model(**inputs), model.head(means))


def test_parameter_counts_of_an_lstm():
    one_direction = 4 * 10 * (12 + 10 + 2)
    assert num_parameters(LSTM(30, 7, width=12, hidden=10)) == 30 * 12 + 2 * one_direction + 21 * 7
    second_layer = 2 * 4 * 10 * (20 + 10 + 2)
    expected = 30 * 12 + 2 * one_direction + second_layer + 21 * 7
    assert num_parameters(LSTM(30, 7, width=12, hidden=10, layers=2)) == expected


def test_a_transformers_width_is_divided_among_its_heads():
    with pytest.raises(ConfigError, match="width is 10; expected a multiple of heads, 4"):
        Transformer(30, 7, max_length=8, width=10)
