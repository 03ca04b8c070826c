"""Pixels on a GPU: the same bits where there is one; elsewhere, that no operation mixes tensors of two devices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.data import DataLoader

from kdpipe import devices, transforms
from kdpipe.transforms import images
from kdpipe.views import PartnerPlan, ViewSpec

NUM_ROWS = 64
IDS = np.array([f"row{row}" for row in range(NUM_ROWS)])
EVERY = {
    "PadAndCrop": transforms.PadAndCrop(),
    "RandomResizedCrop": transforms.RandomResizedCrop(),
    "Flip": transforms.Flip(),
    "ColourJitter": transforms.ColourJitter(),
    "Grey": transforms.Grey(probability=0.5),
    "Blur": transforms.Blur(),
    "Erasing": transforms.Erasing(probability=1.0),
    "RandAugment": transforms.RandAugment(num_ops=4),
    "Mixup": transforms.Mixup(),
    "CutMix": transforms.CutMix(),
}


def shown(transform):
    """All rows, in view 1."""
    rows = np.random.default_rng(0).integers(0, 256, (NUM_ROWS, 16, 12, 3)).astype(np.uint8)
    views = ViewSpec(count=1, transform=transform, partners=PartnerPlan(IDS, np.full(NUM_ROWS, "train")))
    return views.read(lambda some: {"image": rows[some]}, IDS, np.arange(NUM_ROWS), view=1).columns["image"]


@pytest.mark.parametrize("name", EVERY)
def test_no_operation_mixes_devices(name, monkeypatch):
    """Tensors without values, on the device `meta` in the GPU's place: they refuse to meet those of another device."""
    to, back = torch.Tensor.to, []

    def moved(tensor, target):
        if isinstance(target, torch.device):
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=target)
        return to(tensor, target)

    def returned(tensor):
        back.append(tensor.device.type)
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    monkeypatch.setattr("kdpipe.transforms.images.compute_device", lambda: torch.device("meta"))
    monkeypatch.setitem(images._AT_ONCE, "meta", 2**12)
    monkeypatch.setattr(torch.Tensor, "to", moved)
    monkeypatch.setattr(torch.Tensor, "cpu", returned)
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: np.ones(tensor.shape, str(tensor.dtype)[6:]))
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: [0] * len(tensor))
    monkeypatch.setattr(torch, "bincount", lambda tensor, minlength: tensor.new_empty(minlength))
    with FakeTensorMode():
        assert (shown(EVERY[name]) == 1).any()
    assert set(back) == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", EVERY)
def test_a_gpu_gives_the_same_bits(name, monkeypatch):
    on_gpu = shown(EVERY[name])
    monkeypatch.setattr("kdpipe.transforms.images.compute_device", lambda: torch.device("cpu"))
    assert np.array_equal(shown(EVERY[name]), on_gpu)


def where(batch):
    return devices.compute_device().type


def test_a_worker_process_leaves_the_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert where(None) == "cuda"
    assert list(DataLoader([0], collate_fn=where, num_workers=1)) == ["cpu"]
