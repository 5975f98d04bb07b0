"""`python -m optimum_order`: the program `optimum-order`, as torchrun starts it."""

from optimum_order.cli import main

if __name__ == "__main__":
    main()
