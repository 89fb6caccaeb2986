"""`python -m train.reproduction.baselines`."""

from train.reproduction.baselines.command import main

if __name__ == "__main__":
    main()
