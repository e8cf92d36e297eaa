"""`python -m vl_mtl_lora`."""

from vl_mtl_lora.cli import main

main()
