"""Fine-tune a language model on the data of many sites, none of which gives its data away."""

if __name__ == "__main__":
    from scaling_fl.command.__main__ import main

    main()
