"""`python -m train.prior`."""

from train.prior.fitting import main

if __name__ == "__main__":
    main()
