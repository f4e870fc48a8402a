"""Reparameterisations of a weight compute what peft's compute, for the same values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_peft import inject
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
from tests.methods.peft_reference import QUIET, assert_merges_alike, assert_same, both, peft

Build = Callable[[str], Any]

pytestmark = QUIET

BERT = ["query", "value", "output.dense"]
LLAMA = ["q_proj", "v_proj", "down_proj"]
GPT2 = ["c_attn", "mlp.c_proj"]
T5 = ["q", "wo"]
VIT = ["q_proj", "fc2"]
HOSTS = {"bert": BERT, "llama": LLAMA, "t5": T5, "vit": VIT}
TRANSPOSED = {"gpt2": GPT2}

METHODS: dict[str, tuple[Callable[..., Method], Callable[..., Any]]] = {
    "vera": (
        lambda **kw: VeRA(r=16, seed=3, **kw),
        lambda **kw: peft.VeraConfig(r=16, projection_prng_key=3, save_projection=False, **kw),
    ),
    "loha": (
        lambda **kw: LoHa(r=2, alpha=3, **kw),
        lambda **kw: peft.LoHaConfig(r=2, alpha=3, **kw),
    ),
    "loha-of-high-rank": (
        lambda **kw: LoHa(r=8, alpha=3, **kw),
        lambda **kw: peft.LoHaConfig(r=8, alpha=3, **kw),
    ),
    "lokr": (
        lambda **kw: LoKr(r=2, alpha=3, **kw),
        lambda **kw: peft.LoKrConfig(r=2, alpha=3, **kw),
    ),
    "lokr-decomposed": (
        lambda **kw: LoKr(r=1, alpha=3, decompose_both=True, **kw),
        lambda **kw: peft.LoKrConfig(r=1, alpha=3, decompose_both=True, **kw),
    ),
    "lokr-by-a-factor": (
        lambda **kw: LoKr(r=8, alpha=3, factor=3, **kw),
        lambda **kw: peft.LoKrConfig(r=8, alpha=3, decompose_factor=3, **kw),
    ),
    "hira": (lambda **kw: HiRA(r=4, **kw), lambda **kw: peft.HiraConfig(r=4, **kw)),
    "shira": (
        lambda **kw: SHiRA(r=4, seed=3, **kw),
        lambda **kw: peft.ShiraConfig(r=4, random_seed=3, **kw),
    ),
    "miss": (lambda **kw: MiSS(r=8, **kw), lambda **kw: peft.MissConfig(r=8, **kw)),
    "miss-with-a-rest": (lambda **kw: MiSS(r=7, **kw), lambda **kw: peft.MissConfig(r=7, **kw)),
    "oft": (
        lambda **kw: OFT(block_size=8, **kw),
        lambda **kw: peft.OFTConfig(oft_block_size=8, **kw),
    ),
    "oft-by-more-terms": (
        lambda **kw: OFT(block_size=20, terms=7, **kw),
        lambda **kw: peft.OFTConfig(oft_block_size=20, num_cayley_neumann_terms=7, **kw),
    ),
    "oft-exact": (
        lambda **kw: OFT(block_size=8, terms=None, **kw),
        lambda **kw: peft.OFTConfig(oft_block_size=8, use_cayley_neumann=False, **kw),
    ),
    "fourierft": (
        lambda **kw: FourierFT(frequencies=30, scale=90.0, seed=3, **kw),
        lambda **kw: peft.FourierFTConfig(n_frequency=30, scaling=90.0, random_loc_seed=3, **kw),
    ),
    "c3a": (lambda **kw: C3A(block_size=8, **kw), lambda **kw: peft.C3AConfig(block_size=8, **kw)),
    "boft": (
        lambda **kw: BOFT(block_size=4, factors=1, **kw),
        lambda **kw: peft.BOFTConfig(boft_block_size=4, **kw),
    ),
}
SINGLE = ("fourierft", "c3a")
"""What peft computes in single precision even where the model is in double."""

ON_CONV1D = ("vera", "hira")
"""What peft supports on transformers' Conv1D."""

RENAME = {"oft": lambda end: f"{end}.default.weight"}

CASES = [(method, model) for method in METHODS for model in HOSTS]
CASES += [(method, model) for method in ON_CONV1D for model in TRANSPOSED]
ON_CONVOLUTIONS = ("loha", "loha-of-high-rank", "lokr", "lokr-by-a-factor", "hira")
"""What peft supports on convolutions, by its formula for the weight."""

STEM = ["conv_stem", "conv_pw"]


def renamed(method: str) -> Callable[[str], str]:
    return RENAME.get(method.partition("-")[0], lambda end: f"{end}.default")


@pytest.mark.parametrize(("method", "model"), CASES)
def test_outputs_gradients_and_merged_weights_equal_pefts(
    method: str, model: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "c3a":  # its function returns a wrong gradient of its input; its matrix is right
        function = peft.tuners.c3a.layer.BlockCircularConvolution
        monkeypatch.setattr(function, "apply", multiply_circulant)
    ours, theirs = METHODS[method]
    hosts = (HOSTS | TRANSPOSED)[model]
    settings = {"fan_in_fan_out": True} if model in TRANSPOSED else {}
    config = theirs(target_modules=hosts, **settings)
    tolerance = 1e-5 if method in SINGLE else 1e-7
    assert_same(build(model), ours(targets=hosts), config, renamed(method), tolerance)


def multiply_circulant(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    return x @ peft.tuners.c3a.utils.get_circulant_fast(kernel).T


@pytest.mark.parametrize("method", ON_CONVOLUTIONS)
def test_convolutions_equal_pefts(method: str, build: Build) -> None:
    ours, theirs = METHODS[method]
    config = theirs(target_modules=STEM)
    assert_same(build("cnn"), ours(targets=STEM), config, renamed(method))


@pytest.mark.parametrize("method", ["oft", "oft-exact", "boft"])
def test_turned_filters_equal_pefts(method: str, build: Build) -> None:
    """peft's OFT folds turned patches back, which is not what its merged filters compute."""
    ours, theirs = METHODS[method]
    hosts = ["conv_stem"] if method != "boft" else ["conv_pw"]
    pair = both(build("cnn"), ours(targets=hosts), theirs(target_modules=hosts), renamed(method))
    assert_merges_alike(*pair[:2])


def test_a_rescaled_embedding_equals_pefts(build: Build) -> None:
    hosts = ["word_embeddings"]
    config = peft.HiraConfig(r=4, target_modules=hosts)
    rename = {"hira_A": "hira_embedding_A.default", "hira_B": "hira_embedding_B.default"}
    assert_same(build("bert"), HiRA(r=4, targets=hosts), config, rename.__getitem__)


@pytest.mark.parametrize(("model", "factors"), [("llama", 2), ("bert", 3)])
def test_butterflies_equal_pefts(
    model: str, factors: int, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft needs a CUDA kernel for more than one factor: its block diagonal is written out here."""
    layer = peft.tuners.boft.layer
    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer.FastBlockDiag, "apply", block_diagonal)
    hosts = ["q_proj", "gate_proj"] if model == "llama" else ["query", "value"]
    config = peft.BOFTConfig(
        boft_block_size=4, boft_n_butterfly_factor=factors, target_modules=hosts
    )
    method = BOFT(block_size=4, factors=factors, targets=hosts)
    assert_same(build(model), method, config, renamed("boft"))


def block_diagonal(blocks: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.block_diag(*factor) for factor in blocks])


def test_the_random_matrices_and_places_are_pefts(build: Build) -> None:
    model = build("bert").model
    config = peft.VeraConfig(r=5, projection_prng_key=7, target_modules=BERT)
    reference = peft.get_peft_model(build("bert").model, config)
    delta = inject(model, VeRA(r=5, seed=7, targets=BERT)).deltas[0][2]
    assert torch.equal(delta.down, reference.base_model.vera_A["default"])
    assert torch.equal(delta.up, reference.base_model.vera_B["default"])
