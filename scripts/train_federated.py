"""Fine-tune a language model on the data of many sites, none of which gives its data away."""

import signal

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while packages are imported ends without a stack trace
    from scaling_fl.command import main
    from scaling_fl.distributed.launch import run_program

    run_program(main)
