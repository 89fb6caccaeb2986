"""`python -m train.gan`."""

from train.gan.training import main

if __name__ == "__main__":
    main()
