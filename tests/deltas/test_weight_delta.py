"""What all reparameterisations of a weight share: kinds of host, precision, constants, merging."""

import copy
import dataclasses
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft import LoRA, Targets, inject, switch
from lightning_peft.carrying.registry import adapters_of
from lightning_peft.delta import SLOT, NotMergeable, slot_of
from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.method import Method
from lightning_peft.methods.boft import BOFT
from lightning_peft.methods.c3a import C3A
from lightning_peft.methods.fourierft import FourierFT
from lightning_peft.methods.hira import HiRA
from lightning_peft.methods.loha import LoHa
from lightning_peft.methods.lokr import LoKr
from lightning_peft.methods.miss import MiSS
from lightning_peft.methods.oft import OFT
from lightning_peft.methods.shira import SHiRA
from lightning_peft.methods.vera import VeRA

Build = Callable[[str], Any]

METHODS: dict[str, Method] = {
    "vera": VeRA(r=4),
    "loha": LoHa(r=2, alpha=3),
    "loha-dense": LoHa(r=8),
    "lokr": LoKr(r=1, alpha=2),
    "hira": HiRA(r=2),
    "shira": SHiRA(r=1),
    "miss": MiSS(r=4),
    "fourierft": FourierFT(frequencies=7),
    "c3a": C3A(block_size=2),
    "c3a-dense": C3A(block_size=1),
    "oft": OFT(block_size=2),
    "oft-exact": OFT(block_size=3, terms=None),
    "boft": BOFT(block_size=2, factors=2),
}
TURNING = ("oft", "oft-exact", "boft")
SEEDED = {"vera": ("down", "up"), "shira": ("places",), "fourierft": ("places",)}


class Scaled(nn.Embedding):
    """A table that multiplies its rows, as in BART and Gemma."""

    embed_scale = 3.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


class Experts(nn.Module):
    """Fused experts that are read as tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.einsum("bi,eoi->ebo", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("ebo,eio->bi", gate.relu() * up, self.down_proj)


class Attention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x)[0]


def noise(*shape: int) -> Tensor:
    """Return inputs that are the same whenever this file is imported."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 10, shape, generator=torch.Generator().manual_seed(3))


LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(8, 6), noise(2, 3, 8)),
    "linear-without-bias": (lambda: nn.Linear(8, 5, bias=False), noise(4, 8)),
    "linear-of-a-vector": (lambda: nn.Linear(6, 5), noise(6)),
    "linear-of-nothing": (lambda: nn.Linear(6, 5), noise(0, 6)),
    "linear-of-strided-input": (lambda: nn.Linear(6, 5), noise(6, 3, 2).transpose(0, 2)),
    "linear-of-odd-width": (lambda: nn.Linear(7, 5), noise(2, 7)),
    "conv1d-of-transformers": (lambda: Conv1D(5, 8), noise(2, 3, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), noise(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2)), noise(2, 4, 9, 7)),
    "conv2d-reflect": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        noise(2, 4, 9, 7),
    ),
    "attention": (lambda: Attention(8, 2), noise(3, 2, 8)),
    "experts": (Experts, noise(5, 6)),
}
TABLES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "embedding": (lambda: nn.Embedding(10, 6, padding_idx=0), ids(2, 3)),
    "scaled-embedding": (lambda: Scaled(10, 6), ids(2, 3)),
}
IN_GROUPS = {"conv2d-in-groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), noise(2, 4, 9, 7))}

CASES = [(m, layer) for m in METHODS for layer in LAYERS]
CASES += [(m, layer) for m in METHODS if m not in TURNING for layer in TABLES]
READING = (*TURNING, "hira")
CASES += [(m, layer) for m in METHODS if m not in READING for layer in IN_GROUPS]


def adapted(make: Callable[[], nn.Module], method: Method) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(make())
    return model, inject(model, dataclasses.replace(method, targets="0*"), head=False)


def randomise(adapter: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)


def of(adapter: Any) -> Any:
    """Return the first delta that changes one weight."""
    return next(d for _, _, delta in adapter.deltas for d in delta.modules() if hasattr(d, "site"))


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_every_layer_starts_as_the_base_learns_and_merges(method: str, layer: str) -> None:
    make, x = (LAYERS | TABLES | IN_GROUPS)[layer]
    torch.manual_seed(0)
    base = make().requires_grad_(False)(x)
    model, adapter = adapted(make, METHODS[method])
    with torch.no_grad():
        assert torch.equal(model(x), base)
    randomise(adapter)
    tuned = model(x)
    assert tuned.shape == base.shape
    tuned.square().sum().backward()
    for name, parameter in adapter.named_parameters().items():
        assert parameter.grad is not None, name
        assert x.numel() == 0 or parameter.grad.any(), name
    assert x.numel() == 0 or not torch.allclose(tuned, base, atol=1e-3)
    assert adapter.merge() is model
    torch.testing.assert_close(model(x), tuned, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", ["linear", "conv1d-of-transformers", "conv2d", "attention"])
def test_a_base_in_half_precision_has_masters_in_full(method: str, layer: str) -> None:
    make, x = LAYERS[layer]
    torch.manual_seed(0)
    model = nn.Sequential(make()).to(torch.bfloat16)
    settings = dataclasses.replace(METHODS[method], targets="0*")
    adapter = inject(model, settings, head=False)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    randomise(adapter)
    y = model(x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert {p.grad.dtype for p in adapter.parameters()} == {torch.float32}
    full = copy.deepcopy(model).float()(x)
    torch.testing.assert_close(y.float(), full, rtol=0.1, atol=0.1)
    torch.testing.assert_close(adapter.merge()(x.bfloat16()).float(), full, rtol=0.1, atol=0.1)


def test_a_small_change_is_not_rounded_away_in_half_precision() -> None:
    model = nn.Sequential(nn.Linear(8, 6)).to(torch.bfloat16)
    adapter = inject(model, MiSS(r=4, targets="0"), head=False)
    x = torch.randn(64, 8).bfloat16()
    before = model(x).double()
    with torch.no_grad():
        adapter.parameters()[0].fill_(1e-4)
        model[0].weight.fill_(1.0)
        model[0].bias.zero_()
    delta = slot_of(model[0])["default_miss"]
    added = delta(model[0], (x,), {}, torch.zeros_like(before))
    torch.testing.assert_close(added[:, 0], 1e-4 * x.double().sum(1), rtol=0.05, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", ["linear", "conv2d", "experts"])
def test_runs_under_autocast(method: str, layer: str) -> None:
    make, x = LAYERS[layer]
    model, adapter = adapted(make, METHODS[method])
    randomise(adapter)
    full = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), full, rtol=0.1, atol=0.15 * full.abs().max().item())
    low.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_called_by_keyword(method: str) -> None:
    model, adapter = adapted(LAYERS["linear"][0], METHODS[method])
    randomise(adapter)
    x = torch.randn(2, 8)
    assert torch.equal(model[0](input=x), model(x))


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_of_any_kind_is_the_same_layer(method: str) -> None:
    """A `Conv1D` and a convolution of extent 1 compute what a Linear layer computes."""
    linear, transposed = nn.Linear(8, 6), Conv1D(6, 8)
    kernel = nn.Conv1d(8, 6, 1)
    with torch.no_grad():
        transposed.weight.copy_(linear.weight.T), transposed.bias.copy_(linear.bias)
        kernel.weight.copy_(linear.weight.unsqueeze(-1)), kernel.bias.copy_(linear.bias)
    outputs, x = [], torch.randn(3, 5, 8)
    for layer in (linear, transposed, kernel):
        model, adapter = adapted(lambda layer=layer: layer, METHODS[method])
        torch.manual_seed(0)
        of(adapter).reset_parameters()
        randomise(adapter)
        outputs.append(model(x.mT).mT if layer is kernel else model(x))
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["hira", "oft", "boft"])
def test_a_change_that_reads_the_weight_is_not_merged_beside_another(method: str) -> None:
    model, one = adapted(lambda: nn.Linear(8, 6), METHODS[method])
    two = inject(model, LoRA(targets="0"), "two", head=False)
    one.activate()
    with pytest.raises(NotMergeable, match="do not simply add up"):
        one.merge()
    two.remove()
    one.merge()


@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_weight_is_refused_where_it_must_be_read(method: str) -> None:
    layer = nn.Linear(8, 6, bias=False)
    layer.weight = nn.Parameter(torch.ones(6, 8, dtype=torch.int8), requires_grad=False)
    model = nn.Sequential(layer)
    settings = dataclasses.replace(METHODS[method], targets="0")
    if method in READING:
        with pytest.raises(TargetError, match="quantised"):
            inject(model, settings, head=False)
        return
    adapter = inject(model, settings, head=False)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    with pytest.raises(NotMergeable, match="is quantised"):
        adapter.merge()


@pytest.mark.parametrize("method", ["oft", "boft"])
def test_what_has_no_input_to_turn_is_refused(method: str) -> None:
    settings = dataclasses.replace(METHODS[method], targets="0")
    for layer in (nn.Embedding(4, 2), nn.Linear(1, 4)):
        with pytest.raises(TargetError, match="layers with an input wider than 1 that are neither"):
            inject(nn.Sequential(layer), settings, head=False)


@pytest.mark.parametrize("method", SEEDED)
def test_constants_are_shared_and_neither_stored_nor_pickled(method: str, build: Build) -> None:
    example = build("bert")
    adapter = inject(example.model, dataclasses.replace(METHODS[method], targets="query"))
    randomise(adapter)
    output = example.logits()
    names = SEEDED[method]

    def pointers(model: nn.Module) -> list[set[int]]:
        deltas = [delta for _, _, delta in adapters_of(model)["default"].deltas]
        return [{getattr(delta, name).data_ptr() for delta in deltas} for name in names]

    assert [len(found) for found in pointers(example.model)] == [1] * len(names)
    assert not [k for k in adapter.state_dict() if k.rpartition(".")[2] in names]
    pickled = pickle.dumps(example.model)
    for twin in (copy.deepcopy(example.model), pickle.loads(pickled)):
        assert pointers(twin) == pointers(example.model)
        assert torch.equal(example.logits(twin), output)
    assert len(pickle.dumps(of(adapter))) < 4000 + 8 * sum(
        p.numel() for p in of(adapter).parameters()
    )


@pytest.mark.parametrize("method", SEEDED)
def test_constants_follow_a_move_and_a_cast(method: str) -> None:
    model, adapter = adapted(lambda: nn.Linear(8, 6), METHODS[method])
    name = SEEDED[method][0]
    before = getattr(of(adapter), name).clone()
    model.to("meta")
    assert getattr(of(adapter), name).is_meta
    model.to_empty(device="cpu")
    for module in of(adapter).modules():
        getattr(module, "reset_parameters", lambda: None)()
    assert torch.equal(getattr(of(adapter), name), before)
    model.double()
    assert torch.equal(getattr(of(adapter), name).to(before.dtype), before)
    assert model(torch.randn(2, 8).double()).dtype == torch.float64


def test_constants_go_with_the_last_that_holds_them() -> None:
    from lightning_peft.deltas.weight_delta import _SHARED

    gc.collect()
    before = len(_SHARED)
    model, adapter = adapted(lambda: nn.Linear(8, 6), VeRA(r=3, seed=99))
    assert len(_SHARED) == before + 2
    adapter.remove()
    del model, adapter
    gc.collect()
    assert len(_SHARED) == before


@pytest.mark.parametrize("method", METHODS)
def test_made_on_the_meta_device_and_filled_later(method: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 6))
    adapter = inject(model, dataclasses.replace(METHODS[method], targets="0"), head=False)
    assert all(p.is_meta for p in adapter.parameters())
    model.to_empty(device="cpu")
    for module in model.modules():
        if module is not model:
            getattr(module, "reset_parameters", lambda: None)()
    x = torch.randn(2, 8)
    with adapter.disabled():
        base = model(x)
    assert torch.equal(model(x), base)


def test_dropout_only_in_training() -> None:
    for method in (VeRA(r=4, dropout=0.5), HiRA(r=2, dropout=0.5), MiSS(r=4, dropout=0.5)):
        model, adapter = adapted(lambda: nn.Linear(64, 6), method)
        randomise(adapter)
        x = torch.ones(50, 64)
        model.train()
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))
        table, _ = adapted(lambda: nn.Embedding(10, 6), method)
        assert torch.equal(table.train()(ids(3, 4)), table(ids(3, 4)))


def test_rotations_are_orthogonal() -> None:
    for method in (OFT(block_size=4, terms=None), BOFT(block_size=4, factors=2)):
        _, adapter = adapted(lambda: nn.Linear(16, 6), method)
        randomise(adapter)
        turned = of(adapter).as_matrix(torch.zeros(1)) + torch.eye(16)
        torch.testing.assert_close(turned @ turned.T, torch.eye(16), rtol=0, atol=1e-5)
        reach = (turned.abs() > 1e-6).sum(1)
        assert reach.tolist() == [4 if isinstance(method, OFT) else 8] * 16


def test_a_block_takes_the_nearest_divisor() -> None:
    from lightning_peft.ops.orthogonal import nearest_divisor

    assert [nearest_divisor(w, 32) for w in (768, 27, 100, 37, 1009, 1)] == [
        32,
        27,
        25,
        37,
        1009,
        1,
    ]
    assert nearest_divisor(40, 9) == 8
    widths = {(16, 2): 2, (24, 2): 1, (8, 2): 1, (20, 2): 2, (32, 9): 3}
    for (width, factors), expected in widths.items():
        layer = nn.Linear(width, 4)
        _, adapter = adapted(lambda layer=layer: layer, BOFT(block_size=8, factors=factors))
        assert len(of(adapter).boft_R) == expected, width


def test_shira_trains_as_many_entries_as_lora_has_or_all() -> None:
    model, adapter = adapted(lambda: nn.Linear(20, 10), SHiRA(r=3, scale=2.0))
    assert adapter.num_parameters == 3 * 30
    randomise(adapter)
    weight = model[0].weight.clone()
    entries = of(adapter).shira_weight.detach().clone()
    changed = adapter.merge()[0].weight - weight
    torch.testing.assert_close(changed[changed != 0], 2 * entries)
    _, adapter = adapted(lambda: nn.Linear(20, 10), SHiRA())
    assert adapter.num_parameters == 200


def test_seeds_differ() -> None:
    for kind in (VeRA, SHiRA):
        one, two = (of(adapted(lambda: nn.Linear(8, 6), kind(r=1, seed=s))[1]) for s in (0, 1))
        name = SEEDED[kind.kind][0]
        assert not torch.equal(getattr(one, name), getattr(two, name))


def test_parameters_are_as_few_as_the_papers_say() -> None:
    layer = lambda: nn.Linear(64, 36, bias=False)  # noqa: E731
    counts = {
        VeRA(r=256): 256 + 36,
        LoHa(r=8): 2 * 8 * (64 + 36),
        LoKr(r=8): 6 * 8 + 6 * 8,
        LoKr(r=2): 6 * 8 + 2 * (6 + 8),
        LoKr(r=2, decompose_both=True): 2 * (6 + 8) + 2 * (6 + 8),
        LoKr(r=1, factor=2): 2 * 2 + 18 + 32,
        HiRA(r=32): 32 * (64 + 36),
        MiSS(r=16): 16 * 36,
        FourierFT(frequencies=99): 99,
        FourierFT(frequencies=5000): 64 * 36,
        C3A(block_size=256): 64 * 36 // 4,
        OFT(block_size=16): 4 * 16 * 15 // 2,
        BOFT(block_size=8, factors=2): 2 * 8 * 64 + 36,
    }
    for method, expected in counts.items():
        assert adapted(layer, method)[1].num_parameters == expected, method


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VeRA(r=0), "`r` must be at least 1, but is 0 instead"),
        (lambda: VeRA(d_initial=0), "`d_initial` must not be 0"),
        (lambda: VeRA(dropout=1.0), r"`dropout` must lie in \[0, 1\), but is 1.0"),
        (lambda: LoHa(r=-1), "`r` must be at least 1, but is -1 instead"),
        (lambda: LoKr(r=0), "`r` must be at least 1, but is 0 instead"),
        (lambda: LoKr(factor=0), "`factor` must be at least 1 or None, but is 0 instead"),
        (lambda: HiRA(r=0), "`r` must be at least 1, but is 0 instead"),
        (lambda: HiRA(dropout=-0.1), r"`dropout` must lie in \[0, 1\), but is -0.1"),
        (lambda: SHiRA(r=0), "`r` must be at least 1, but is 0 instead"),
        (lambda: SHiRA(scale=0), "`scale` must not be 0"),
        (lambda: MiSS(r=0), "`r` must be at least 1, but is 0 instead"),
        (lambda: MiSS(dropout=2.0), r"`dropout` must lie in \[0, 1\), but is 2.0"),
        (lambda: OFT(block_size=1), "`block_size` must be at least 2, but is 1 instead"),
        (lambda: OFT(terms=3), "`terms` must be at least 4 or None, but is 3 instead"),
        (lambda: BOFT(block_size=0), "`block_size` must be at least 2, but is 0 instead"),
        (lambda: FourierFT(frequencies=0), "`frequencies` must be at least 1, but is 0 instead"),
        (lambda: FourierFT(scale=0), "`scale` must not be 0"),
        (lambda: C3A(block_size=0), "`block_size` must be at least 1, but is 0 instead"),
        (lambda: BOFT(factors=0), "`factors` must be at least 1, but is 0 instead"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Method], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("method", METHODS)
def test_targets_and_layers_are_taken(method: str, build: Build) -> None:
    model = build("bert").model
    settings = dataclasses.replace(METHODS[method], targets="query", layers=[-1])
    hosts = [name for name, _, _ in inject(model, settings, head=False).deltas]
    assert hosts == ["bert.encoder.layer.1.attention.self.query"]
    settings = dataclasses.replace(METHODS[method], targets=Targets("qery"))
    with pytest.raises(TargetError, match="Did you mean `query`"):
        inject(build("bert").model, settings)


def test_two_adapters_keep_apart(build: Build) -> None:
    example = build("llama")
    base = example.logits()
    one = inject(example.model, VeRA(r=4, seed=1), "one")
    two = inject(example.model, LoKr(r=1), "two")
    randomise(one), randomise(two)
    switch(example.model, "one")
    first = example.logits()
    assert not torch.equal(first, base)
    two.remove()
    assert torch.equal(example.logits(), first)
    one.remove()
    assert torch.equal(example.logits(), base)
    assert not any(SLOT in name for name in example.model.state_dict())
