"""`python -m lora` is the command `lora`, from a checkout that is not installed too."""

from lora.cli.main import main

main()
