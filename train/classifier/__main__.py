"""`python -m train.classifier`."""

from train.classifier.training import main

if __name__ == "__main__":
    main()
