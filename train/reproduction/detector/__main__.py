"""`python -m train.reproduction.detector`."""

from train.reproduction.detector.training import main

if __name__ == "__main__":
    main()
