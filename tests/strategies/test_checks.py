import pytest
import torch
from torch import nn

from lightning_peft import LoRA
from lightning_peft.errors import AdapterError, ConfigError
from lightning_peft.strategies.checks import (
    assert_same_on_all_ranks,
    check_strategy,
    refuse_wrapped,
)
from lightning_peft.training.injection import Injection


@pytest.mark.parametrize("name", ["fsdp", "fsdp_cpu_offload", "deepspeed", "deepspeed_stage_2"])
@pytest.mark.parametrize("cuda", [True, False])
def test_what_needs_cuda_is_refused_on_the_cpu(
    name: str, cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    family = name.split("_")[0]
    with pytest.raises(ConfigError, match=rf"`trainer={family}` needs a CUDA GPU.*model_parallel"):
        check_strategy(name, "cpu")
    if cuda:
        check_strategy(name, "auto")
    else:
        with pytest.raises(ConfigError, match="needs a CUDA GPU"):
            check_strategy(name, "auto")


@pytest.mark.parametrize("name", ["auto", "ddp", "model_parallel"])
def test_what_runs_on_the_cpu_is_accepted(name: str) -> None:
    check_strategy(name, "cpu", clip="norm")


def test_clipping_by_norm_is_refused_under_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_strategy("fsdp", "gpu", clip="value")
    check_strategy("deepspeed", "gpu", clip="norm")
    with pytest.raises(ConfigError, match="`gradient_clip_algorithm` must be 'value'"):
        check_strategy("fsdp", "gpu", clip="norm")


class DistributedDataParallel(nn.Module):
    """A user's own class of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)


def test_a_wrapped_base_is_refused_before_anything_is_injected() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2)))
    keys = list(model.state_dict())
    with pytest.raises(AdapterError, match=r"`1` must be a bare module.*wrapped by DataParallel"):
        Injection((LoRA(targets="0"),)).into(model)
    assert list(model.state_dict()) == keys


def test_a_class_of_the_same_name_is_not_taken_for_a_wrapper() -> None:
    refuse_wrapped(DistributedDataParallel())


def test_one_process_agrees_with_itself() -> None:
    assert_same_on_all_ranks("anything", "the configuration")
