"""Fine-tune a language model on the data of many sites, none of which gives its data away."""

from scaling_fl.command import main
from scaling_fl.distributed.launch import run_program

if __name__ == "__main__":
    run_program(main)
