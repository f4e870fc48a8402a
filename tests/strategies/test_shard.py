from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule

from lightning_peft import LoRA, inject
from lightning_peft.errors import AdapterError
from lightning_peft.strategies.checks import is_sharded
from lightning_peft.strategies.shard import like, shard, shard_children, whole
from lightning_peft.training.injection import Injection


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoder(layer, 2), nn.LayerNorm(8))


def test_each_layer_and_the_rest_are_sharded_and_compute_the_same(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    model, x = encoder(), torch.randn(3, 5, 4)
    adapter = inject(model, LoRA(r=2, targets="*.linear1"), head=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(x)
    shard(model, mesh)
    assert [isinstance(m, FSDPModule) for m in (model, *model[1].layers)] == [True] * 3
    assert all(is_sharded(layer, recurse=True) for layer in model[1].layers)
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    after = model.state_dict()
    assert all(torch.equal(whole(after[name]), tensor) for name, tensor in before.items())


def test_a_second_call_changes_nothing(mesh: DeviceMesh) -> None:
    model = encoder()
    shard(model, mesh)
    classes = [type(module) for module in model.modules()]
    shard(model, mesh)
    assert [type(module) for module in model.modules()] == classes


def test_a_sharded_base_is_refused_by_the_injection(mesh: DeviceMesh) -> None:
    model = encoder()
    shard(model, mesh)
    with pytest.raises(AdapterError, match=r"`FSDPSequential` must be a bare module.*FSDP2"):
        Injection((LoRA(),)).into(model)


def test_frozen_bf16_beside_trained_fp32_is_fine(mesh: DeviceMesh) -> None:
    model = encoder().to(torch.bfloat16)
    adapter = inject(model, LoRA(r=2, targets="*.linear1"), head=False)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    shard(model, mesh)
    model(torch.randn(3, 5, 4, dtype=torch.bfloat16)).float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


def test_two_dtypes_trained_in_one_layer_are_refused_before_any_is_sharded(
    mesh: DeviceMesh,
) -> None:
    model = encoder().to(torch.bfloat16)
    inject(model, LoRA(r=2, targets="*.linear1"), train="1.layers.1.linear2", head=False)
    with pytest.raises(AdapterError, match=r"must have one dtype.*bfloat16.*float32|float32.*bf"):
        shard(model, mesh)
    assert not is_sharded(model)


class Module(nn.Module):
    """Stands for a LightningModule, whose step calls its children."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList([encoder(), encoder()])
        self.scale = nn.Parameter(torch.ones(1))


def test_the_children_of_containers_are_sharded(mesh: DeviceMesh) -> None:
    module = Module()
    module.scale.requires_grad_(False)
    shard_children(module, mesh)
    assert all(isinstance(child, FSDPModule) for child in module.encoders)


def test_a_trained_parameter_outside_all_children_is_refused(mesh: DeviceMesh) -> None:
    with pytest.raises(AdapterError, match="`scale` must belong to a sub-module"):
        shard_children(Module(), mesh)


def test_a_whole_tensor_is_split_like_another_and_gathered_again(mesh: DeviceMesh) -> None:
    model = nn.Linear(3, 3)
    shard(model, mesh)
    value = torch.randn(3, 3)
    assert torch.equal(whole(like(value, model.weight)), value)
    assert like(value, torch.zeros(3, 3)) is value
