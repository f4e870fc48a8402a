"""The command line: what it refuses, in one sentence and with nothing left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_peft.jobs.conf import Conf, own_folder
from tests.jobs.command import Run

MISTAKES = [
    (["model=bertt"], "but is 'bertt' instead. Did you mean `bert`?"),
    (["method=[lora,dora2]"], "but is 'dora2' instead. Did you mean `dora`"),
    (
        ["modle=hf"],
        "`modle` must be a setting, but there is none of that name. Did you mean `model`",
    ),
    (["method.lora.rr=3"], "`method.lora.rr` must be a setting, but there is none of that name."),
    (["epochs=3"], "`trainer.max_epochs`"),
    (["lr=1"], "Did you mean `optimizer.lr`"),
    (["method.lora.r={"], "`method.lora.r={` must be `name=value`, but cannot be read"),
    (["method.lora.r"], "`method.lora.r` must be `name=value`"),
    (["title=${nobody}"], "`title` cannot be resolved: Interpolation key 'nobody' not found"),
    (["method.lora.r=eight"], "`method.lora.r` must be int, but is 'eight' instead."),
    (
        ["method.lora.bias=some"],
        "`method.lora.bias` must be 'none' or 'lora' or 'all', but is 'some'",
    ),
    (["+method.lora.ranks=3"], "`method.lora.ranks` must be a setting of LoRA"),
    (
        ["method.lora._target_=os.system"],
        "`method.lora._target_` must be a class of lightning_peft",
    ),
    (["model._target_=builtins.eval"], "`model._target_` must be a class of lightning_peft"),
    (["job._target_=lightning_peft.cli.os.system"], "does not exist"),
    (["method.lora.targets=querry"], "query"),
    (["optimizer.lr=fast"], "`optimizer.lr` must be float, but is 'fast' instead."),
    (["optimizer.schedule=linaer"], "Did you mean `linear`"),
    (["adapter.head=maybe"], "`adapter.head` must be bool, but is 'maybe' instead."),
    (["trainer.max_epochs=two"], "`trainer.max_epochs` must be int or null, but is 'two' instead."),
    (["trainer.precision=7"], "`trainer.precision` must be"),
    (["trainer=gpu"], "there is no CUDA GPU here"),
    (["trainer=fsdp"], "`trainer=fsdp` needs a CUDA GPU"),
    (["trainer=deepspeed"], "`trainer=deepspeed` needs a CUDA GPU"),
    (["model.name=no/such-model-anywhere"], "no/such-model-anywhere"),
    (["data.path=missing.csv"], "'missing.csv' does not exist"),
    (["data.text=txt"], "`text` must be a column of"),
    (["data.label=lable"], "Did you mean `label`?"),
    (["data.labels=[good,better]"], "bad"),
    (["data.path=???"], "`data.path` has no value: give it as `data.path=...`."),
    (
        ["callbacks.best.monitor=val/f1"],
        "give `callbacks.best.mode=min` or `callbacks.best.mode=max`",
    ),
    (["job=test"], "`run` must be the folder of an earlier run: job=test run=<folder>."),
    (["job=resume"], "job=resume run=<folder>"),
    (["job=predict"], "job=predict run=<folder>"),
    (["--experimental-rerun", "config.pickle"], "it unpickles a file"),
    (["--config-dir", "nowhere"], "nowhere"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_a_mistake_costs_one_sentence(
    run: Run, small: list[str], arguments: list[str], message: str, no_network: None
) -> None:
    done = run(*small, *arguments)
    assert done.code == 1
    assert message in done.err
    errors = [line for line in done.err.splitlines() if line.startswith("Error")]
    assert len(errors) == 1
    assert "Traceback" not in done.err + done.out
    assert list(Path("runs").glob("*/*")) == []


def test_a_mistake_in_run_is_one_sentence(run: Run, tmp_path: Path) -> None:
    done = run("job=test", f"run={tmp_path}")
    assert done.code == 1
    assert "holds no `config.yaml`" in done.err
    (tmp_path / "config.yaml").write_text("job: [", encoding="utf-8")
    done = run("job=test", f"run={tmp_path}")
    assert done.code == 1
    assert "must be YAML" in done.err


def test_an_unexpected_error_keeps_its_trace(
    run: Run, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lightning_peft.jobs.fit

    def fail(settings: object) -> None:
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(lightning_peft.jobs.fit, "build", fail)
    with pytest.raises(ZeroDivisionError, match="a bug of ours"):
        run(*small)


def test_a_sweep_over_several_processes_is_refused(run: Run, small: list[str]) -> None:
    done = run("--multirun", *small, "seed=1,2", "trainer=ddp")
    assert done.code == 1
    assert "`trainer.devices` must be 1 in a sweep (--multirun)" in done.err


def test_a_users_file_that_is_not_read_is_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine" / "method").mkdir(parents=True)
    (tmp_path / "mine" / "method" / "lora.yaml").write_text("{}", encoding="utf-8")
    with pytest.warns(UserWarning, match=r"lora\.yaml` is not read, since lightning-peft has"):
        done = run("--config-dir", str(tmp_path / "mine"), "job=list")
    assert done.code == 0


def test_a_users_own_option_is_found_and_listed(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "method"
    folder.mkdir(parents=True)
    text = "# @package _global_\n# LoRA as we like it\nmethod:\n  lora:\n    r: 2\n"
    (folder / "ours.yaml").write_text(text, encoding="utf-8")
    done = run("--config-dir", str(tmp_path / "mine"), "job=list")
    assert done.code == 0
    assert "LoRA as we like it" in done.out
    done = run("--config-dir", str(tmp_path / "mine"), "method=[lora,ours]", "--cfg", "job")
    assert "    r: 2\n" in done.out


def test_a_package_of_the_users_own_must_be_allowed(run: Run, small: list[str]) -> None:
    target = "method.lora._target_=tests.jobs.own_method.OwnLoRA"
    refused = run(*small, target)
    assert "`allow=[my_package]`" in refused.err
    assert "tests.jobs.own_method" not in sys.modules
    done = run(*small, target, "allow=[tests]", "job=list", "method=lora")
    assert done.code == 0
    assert "LoRA of the user's own" in done.out


def test_help_config_and_completion_work(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "job=list" in run("--help").out
    assert "_target_: lightning_peft.jobs.fit.Fit" in run("--cfg", "job").out
    monkeypatch.setenv("COMP_LINE", "lightning-peft method=fre")
    monkeypatch.setenv("COMP_POINT", "25")
    assert run("-sc", "query=bash").out.split() == ["method=freeze"]


def test_the_command_line_starts_without_the_heavy_packages() -> None:
    code = (
        "import sys, lightning_peft.cli\n"
        "print({'torch', 'lightning', 'transformers', 'wandb'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_our_files_are_found_in_the_sources() -> None:
    assert (own_folder() / "train.yaml").is_file()
    assert "lora" in Conf(own_folder()).options("method")


def _interrupted(process: "subprocess.Popen[str]") -> str:
    """Press Ctrl-C, again after a while: Python drops one that arrives within a destructor."""
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=60)[0]
    process.kill()
    return process.communicate()[0]


def test_ctrl_c_keeps_adapter_and_checkpoint(small: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_peft.cli", *small]
    settings = ["trainer.max_epochs=100000", f"folder={tmp_path / 'run'}"]
    process = subprocess.Popen(
        [*command, *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    last = tmp_path / "run" / "checkpoints" / "last.ckpt.sha256"
    while process.poll() is None and not last.exists():
        time.sleep(0.1)
    out = _interrupted(process)
    assert process.returncode == 130, out
    assert "Traceback" not in out
    assert f"job=resume run={tmp_path / 'run'}" in out
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
