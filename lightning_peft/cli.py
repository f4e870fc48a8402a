"""The console script `lightning-peft`: a Hydra application whose configuration lies in `conf/`.

Hydra composes the configuration; the value of `job=` decides what runs. What a user can mend ends
in one sentence on standard error and exit code 1; anything else keeps its stack trace.
"""

import argparse
import errno
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

# Nothing heavy here: shell completion runs this module at every press of the Tab key.
import hydra
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_peft.config import allow_packages, instantiate
from lightning_peft.errors import ConfigError, PEFTError
from lightning_peft.jobs import saved
from lightning_peft.jobs.conf import Conf, own_folder
from lightning_peft.jobs.explain import explain
from lightning_peft.jobs.quiet import quieten

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)

INTERRUPTED = 130
"""Exit code of a command that was stopped with Ctrl-C, as shells expect it."""


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 a mistake of the user, 130 interrupted."""
    # Hydra prints its errors itself, with its own hints, unless it is told to raise them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    arguments = sys.argv[1:]
    options = get_args_parser().parse_args(arguments)
    with _one_sentence():
        _run(arguments, options)
    sys.exit(0)


@contextmanager
def _one_sentence() -> Iterator[None]:
    """End the process with the sentence of an error that the user can mend."""
    try:
        yield
    except PEFTError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        _fail(f"{error}.")
    except Exception as error:
        # Lightning's own word for settings that do not go together; its import is slow.
        if type(error).__name__ != "MisconfigurationException":
            raise
        _fail(str(error))


def _run(arguments: list[str], options: argparse.Namespace) -> None:
    if options.experimental_rerun:
        raise ConfigError(
            "`--experimental-rerun` must not be used, since it unpickles a file: "
            "give `run=<folder>` instead."
        )
    conf = Conf(own_folder(), (Path(options.config_dir),) if options.config_dir else ())
    _warn_of_shadowed_files(conf)
    name, overrides = "train", options.overrides
    try:
        if folder := saved.requested(overrides):
            name = "saved_run"
            overrides = saved.store(name, folder, options.overrides, conf)
        flags = [argument for argument in arguments if argument not in options.overrides]
        sys.argv[1:] = [*flags, *overrides]
        application = hydra.main(version_base="1.3", config_path=str(conf.own), config_name=name)
        application(lambda config: _run_job(config, arguments))()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, name, conf, overrides)) from error


def _run_job(config: DictConfig, arguments: Sequence[str]) -> None:
    sys.argv[1:] = arguments  # with which Lightning starts the other processes
    quieten()
    with _one_sentence():  # here, since Hydra would print a line of its own first
        allow_packages(*config.allow)
        job = instantiate(OmegaConf.to_container(config.job, resolve=True), "job")
        OmegaConf.set_readonly(config, True)
        job.run(config)


def _warn_of_shadowed_files(conf: Conf) -> None:
    for path in conf.shadowed():
        warnings.warn(
            f"`{path}` is not read, since lightning-peft has a file of that name: rename it.",
            stacklevel=2,
        )


def _fail(message: str) -> NoReturn:
    print(f"Error: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201
    sys.exit(1)


if __name__ == "__main__":
    main()
