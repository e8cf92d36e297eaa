"""`python -m vl_mtl_lora`, and what `accelerate launch -m` and `torchrun -m` start."""

from vl_mtl_lora.cli import main

main()
