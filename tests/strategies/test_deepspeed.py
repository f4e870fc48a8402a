import os
import pickle
from pathlib import Path

import pytest
import torch

from lightning_peft.strategies.deepspeed import only_safe_loads


@pytest.mark.parametrize("before", [None, "0"])
def test_no_load_runs_a_payload_whatever_it_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    if before is not None:
        monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", before)
    torch.save({"foreign": Path("x"), "w": torch.ones(2)}, tmp_path / "states.pt")
    with only_safe_loads(), pytest.raises(pickle.UnpicklingError, match="Path"):
        torch.load(tmp_path / "states.pt", weights_only=False)
    assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") == before
    assert torch.load(tmp_path / "states.pt", weights_only=False)["foreign"] == Path("x")
