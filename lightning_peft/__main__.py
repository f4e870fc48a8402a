"""`python -m lightning_peft` is the command `lightning-peft`, as for launchers such as torchrun."""

from lightning_peft.cli import main

main()
